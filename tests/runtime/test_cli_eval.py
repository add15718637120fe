"""`mllama eval`: right scores of the miniature's own questions, results that can be compared, mistakes in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mllama_runtime import Engine, RequestError
from mllama_runtime.cli import main
from mllama_runtime.engine import EncodedImage
from mllama_runtime.errors import ImageError, InputError
from mllama_runtime.evaluation.asking import AskOptions, answers_from_engine
from mllama_runtime.evaluation.questions import Question, Task, task_from_jsonl
from mllama_runtime.evaluation.result import Result as Evaluation
from mllama_runtime.evaluation.result import difference, result_from_answers

from ._terminal import Terminal

QUICK = ("--threads", "1", "--verify", "quick")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, args)])


@pytest.fixture(scope="module")
def bundle(bundle_of: Callable[..., Path]) -> Path:
    return bundle_of()


@pytest.fixture(scope="module")
def task(miniature: Path) -> Path:
    """18 questions about six pictures, all of which the miniature answers right."""
    return miniature.parent / "pictures" / "questions.jsonl"


@pytest.fixture
def few(task: Path, tmp_path: Path) -> Path:
    """Four of them, in two groups; the last one's expected answer is wrong."""
    lines = [json.loads(line) for line in task.read_text().splitlines()[:4]]
    for number, line in enumerate(lines):
        line |= {
            "image": str(task.parent / line["image"]),
            "id": f"q{number}",
            "group": "odd" if number % 2 else "even",
        }
    lines[3]["answer"] = "There are nine purple shapes."
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_miniature_answers_its_own_questions(bundle: Path, task: Path, tmp_path: Path) -> None:
    output = tmp_path / "result.json"
    result = run(bundle, "--task", task, "--output", output, "--json", *QUICK)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    shown = json.loads(result.stdout)
    kept = json.loads(output.read_bytes())
    assert shown.pop("seconds") > 0
    assert shown.pop("questions_per_second") > 0
    assert shown == kept
    assert set(kept) == {
        *("schema_version", "bundle", "precision", "mask_semantics", "backend", "metric", "task", "score", "interval"),
        *("vision_states", "interval_kind", "groups", "questions", "options", "tools"),
    }
    assert (kept["score"], kept["metric"], kept["precision"], kept["backend"]) == (1.0, "exact", "fp32", "cpu")
    assert kept["interval_kind"] == "wilson"
    assert kept["interval"] == pytest.approx([0.8241, 1.0], abs=5e-5)  # 18 of 18: n / (n + 1.96^2)
    assert kept["task"]["num_questions"] == len(kept["questions"]) == 18
    assert kept["questions"][0] == {"id": "line 1", "answer": "The cross is purple.", "score": 1.0}
    assert kept["options"] == {"system": None, "max_new_tokens": 64, "batch": 8, "date_string": "26 Jul 2024"}
    assert result.stderr.splitlines()[-1] == "eval: 18 of 18 questions"
    again = tmp_path / "again.json"
    assert run(bundle, "--task", task, "--output", again, *QUICK).exit_code == 0
    assert again.read_bytes() == output.read_bytes()
    assert Evaluation.from_file(output).to_json() == output.read_bytes()


def test_text_with_groups_and_a_baseline(bundle: Path, few: Path, tmp_path: Path) -> None:
    before, cut = tmp_path / "before.json", tmp_path / "cut.json"
    result = run(bundle, "--task", few, "--output", before, *QUICK)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["group", "score", "questions"],
        ["even", "100.00%", "2"],
        ["odd", "50.00%", "2"],
        ["all", "75.00%", "4"],
    ]
    assert (
        "(fp32, hf mask, published vision states, cpu): exact 75.00% (95% bootstrap interval 25.00% to 100.00%)"
        in lines[4]
    )
    assert lines[5].startswith("4 questions in ")

    same = run(bundle, "--task", few, "--baseline", before, *QUICK)
    assert "+0.00 points (95% paired wilson interval -48.99 to +48.99); 0 scores changed" in same.stdout
    worse = run(bundle, "--task", few, "--baseline", before, "--max-new-tokens", 1, "--output", cut, "--json", *QUICK)
    assert worse.exit_code == 0, worse.output
    change = json.loads(worse.stdout)["difference"]
    assert (change["score"], change["num_scores_changed"], change["interval_kind"]) == (-0.75, 3, "bootstrap")
    assert change["interval"] == [-1.0, -0.25]  # means of four draws of 0 or -1, three of four -1
    better = run(bundle, "--task", few, "--baseline", cut, *QUICK)
    assert "+75.00 points" in better.stdout


def test_options_reach_the_engine(bundle: Path, few: Path) -> None:
    args = (bundle, "--task", few, "--system", "Answer with one word.", "--limit", 1, "--batch", 1, "--json", *QUICK)
    result = run(*args)
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert [each["answer"].lower().strip(".") for each in shown["questions"]] == ["purple"]
    assert (shown["options"]["system"], shown["options"]["batch"]) == ("Answer with one word.", 1)
    assert shown["task"]["num_questions"] == 1


def test_metrics_by_name(bundle: Path, few: Path, tmp_path: Path) -> None:
    """The answers are right but for the fourth, "There is one purple shape.", where nine are expected."""
    assert json.loads(run(bundle, "--task", few, "--metric", "anls", "--json", *QUICK).stdout)["score"] > 0.75
    line = json.loads(few.read_text().splitlines()[0])
    line |= {"options": ["green", "purple"], "answer": "purple"}
    few.write_text(json.dumps(line))
    shown = json.loads(run(bundle, "--task", few, "--json", *QUICK).stdout)
    assert shown["metric"] == "choice"
    refused = run(bundle, "--task", few, "--metric", "vqa", *QUICK)
    assert (refused.exit_code, refused.stdout) == (3, "")
    assert "few.jsonl: q0: has options" in refused.stderr


def test_a_terminal_sees_a_bar(bundle: Path, few: Path) -> None:
    with Terminal("eval", bundle, "--task", few, *QUICK) as terminal:
        text, code = terminal.end()
    assert code == 0
    assert "4/4" in text
    assert "75.00%" in text


# Mistakes.


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ((), 2, "Missing option '--task'"),
        (("--task", "absent.jsonl"), 3, "absent.jsonl: cannot be read"),
        (("--task", "TASK", "--metric", "bleu"), 2, "'bleu' is not one of"),
        (("--task", "TASK", "--metric", "choice"), 3, "line 1: has no options"),
        (("--task", "TASK", "--limit", "0"), 2, "--limit"),
        (("--task", "TASK", "--batch", "0"), 2, "--batch"),
        (("--task", "TASK", "--baseline", "TASK"), 3, "not JSON"),
        (("--task", "TASK", "--output", "absent/x.json"), 3, "its folder is absent or read-only"),
        (("--task", "TASK", "--output", "."), 3, "is a folder"),
        (("--task", "TASK", "--system", "\udcff"), 3, "--system: holds half of a surrogate pair"),
    ],
)
def test_mistakes_are_one_line(args: tuple[str, ...], code: int, message: str, bundle: Path, task: Path) -> None:
    result = run(bundle, *(str(task) if arg == "TASK" else arg for arg in args), *QUICK)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.output


def test_a_missing_bundle_is_named(task: Path, tmp_path: Path) -> None:
    result = run(tmp_path / "absent", "--task", task, "--json")
    assert result.exit_code == 3
    assert "absent" in json.loads(result.stdout)["error"]["where"]


def test_a_baseline_of_other_questions_is_refused(bundle: Path, few: Path, task: Path, tmp_path: Path) -> None:
    before = tmp_path / "before.json"
    assert run(bundle, "--task", few, "--output", before, *QUICK).exit_code == 0
    for args, field in (
        (("--task", task), "task.sha256"),
        (("--task", few, "--limit", 2), "task.num_questions"),
        (("--task", few, "--metric", "relaxed"), "metric"),
    ):
        result = run(bundle, *args, "--baseline", before, *QUICK)
        assert result.exit_code == 3
        assert f"before.json: {field}: another task" in result.stderr


# Asking.


def test_answers_do_not_depend_on_the_batch_and_pictures_are_encoded_once(
    engine: Engine, task: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = task_from_jsonl(task).questions
    shuffled = [questions[index] for index in (0, 17, 3, 1, 16, 4, 2, 15, 5)]  # three pictures, mixed up
    shuffled.insert(4, Question("text", "What comes after three?", ("Four comes after three.",)))
    encoded, counts = [], []
    encode_image = Engine.encode_image

    def counting(self: Engine, image: Any) -> EncodedImage:
        encoded.append(image)
        return encode_image(self, image)

    monkeypatch.setattr(Engine, "encode_image", counting)
    answers = answers_from_engine(engine, shuffled, AskOptions(batch=4), counts.append)
    assert counts == [4, 4, 2]
    assert len(encoded) == len(set(encoded)) == 3
    assert answers == [question.answers[0] for question in shuffled]
    assert answers_from_engine(engine, shuffled, AskOptions(batch=1)) == answers


def test_the_question_to_blame_is_named(engine: Engine, few: Path) -> None:
    right = task_from_jsonl(few).questions[0]
    long = Question("the long one", "why " * engine.model.text.max_seq_len, ("So.",))
    with pytest.raises(RequestError, match="the long one: prompt: the prompt is too long"):
        answers_from_engine(engine, [right, long, right], AskOptions())


def test_a_damaged_picture_is_named(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "damaged.png"
    path.write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"damaged\.png"):
        answers_from_engine(engine, [Question("q", "What?", ("So.",), (path,))], AskOptions())


def test_a_base_model_continues_the_bare_question(bundle: Path, few: Path, tmp_path: Path) -> None:
    base = shutil.copytree(bundle, tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    manifest = json.loads((base / "manifest.json").read_bytes())
    del manifest["files"]["chat_template.jinja"]
    (base / "manifest.json").write_text(json.dumps(manifest))
    result = run(base, "--task", few, "--max-new-tokens", 2, "--json", *QUICK)
    assert result.exit_code == 0, result.output
    with Engine.load(base, num_threads=1) as engine:
        (question, *_) = task_from_jsonl(few).questions
        expected = engine.generate(f"<|image|>{question.text}", images=question.images).text
    assert expected.startswith(json.loads(result.stdout)["questions"][0]["answer"])


# Results.


def result_of(engine: Engine, answers: list[str], scores: list[float]) -> Evaluation:
    questions = tuple(Question(f"q{number}", "Why?", ("So.",), group="why\u00e9") for number in range(len(scores)))
    task = Task("t", "0" * 64, questions)
    return result_from_answers(engine, task, metric="anls", answers=answers, scores=scores, options=AskOptions())


@pytest.fixture(scope="module")
def evaluation(engine: Engine) -> Evaluation:
    return result_of(engine, ["So.", "a\x1b[2J\nb", "", "So."], [1, 0, 0.5, 1])


def test_a_result_is_read_as_it_was_written(evaluation: Evaluation, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(evaluation.to_json())
    assert Evaluation.from_file(path) == evaluation
    assert (evaluation.score, evaluation.groups["why\u00e9"].score) == (0.625, 0.625)


@pytest.mark.parametrize("scores", [[0.3] * 7, [0.9] * 11, [0.1, *[0.7] * 12], [1 / 3] * 3, [0.0], [1.0] * 9])
def test_rounding_does_not_make_a_result_wrong(scores: list[float], engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(result_of(engine, ["So."] * len(scores), scores).to_json())
    Evaluation.from_file(path)


def test_differences_are_of_the_same_question(evaluation: Evaluation) -> None:
    scores = (0.0, 1.0, 0.5, 1.0)
    pairs = zip(evaluation.questions, scores, strict=True)
    other = replace(evaluation, questions=tuple(replace(each, score=score) for each, score in pairs))
    found = difference(other, evaluation)
    assert (found.score, found.num_scores_changed) == (0, 2)
    assert found.interval == (-0.75, 0.75)  # of -1, 1, 0, 0: 3.5% of the means are -0.75 or less, 0.4% are -1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 3}, "schema_version: unknown version: expected 2, found 3"),
        ({"score": 0.9}, "score: not the mean of the scores"),
        ({"score": "high"}, "score: wrong type"),
        ({"interval": [0.9, 0.1]}, "interval: impossible interval"),
        ({"interval": [0.1]}, "interval: wrong length"),
        ({"interval_kind": "guess"}, "interval_kind: unknown value"),
        ({"metric": "bleu"}, "metric: unknown value"),
        ({"precision": "int3"}, "precision: unknown value"),
        ({"questions": []}, "questions: no questions"),
        ({"extra": 1}, "extra: the field is unknown"),
        ({"task": {"name": "t", "sha256": "0" * 64, "num_questions": 5}}, "questions: not all are there"),
        ({"groups": {"a": {"score": 1.5, "num_questions": 1}}}, "groups\\['a'\\]: impossible group"),
    ],
)
def test_a_wrong_result_is_refused(
    change: dict[str, Any], message: str, evaluation: Evaluation, tmp_path: Path
) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(json.loads(evaluation.to_json()) | change))
    with pytest.raises(InputError, match=rf"result\.json: {message}"):
        Evaluation.from_file(path)


def test_a_result_of_an_older_version_is_read(evaluation: Evaluation, tmp_path: Path) -> None:
    value = json.loads(evaluation.to_json())
    del value["vision_states"]
    path = tmp_path / "result.json"
    path.write_text(json.dumps(value | {"schema_version": 1}))
    assert Evaluation.from_file(path) == replace(evaluation, vision_states="transformers-4.56")


@pytest.mark.parametrize(
    ("score", "index", "message"), [(1.5, 0, "a score is out of range"), (1, 1, "an id stands twice")]
)
def test_wrong_questions_of_a_result_are_refused(
    score: float, index: int, message: str, evaluation: Evaluation, tmp_path: Path
) -> None:
    value = json.loads(evaluation.to_json())
    value["questions"][index] |= {"id": "q0", "score": score}
    path = tmp_path / "result.json"
    path.write_text(json.dumps(value))
    with pytest.raises(InputError, match=message):
        Evaluation.from_file(path)
