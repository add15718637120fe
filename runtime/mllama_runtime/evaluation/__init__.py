"""How good are a bundle's answers? Questions with known answers, asked and scored, with intervals.

    task = task_from_jsonl(path)
    score = metric_of("exact", task.questions)
    answers = answers_from_engine(engine, task.questions, AskOptions())
    scores = [score(answer, question) for answer, question in zip(answers, task.questions)]

`questions` reads them, `asking` puts them to an engine, `metrics` (with `vqa` and `choice`) scores the answers,
`intervals` says how sure a mean is, `result` is the file that keeps it all.
"""
