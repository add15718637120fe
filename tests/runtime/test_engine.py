"""The engine: rows are independent, pictures are seen once, streams can be stopped, limits are said."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from mllama_runtime import BundleError, Engine, Request, RequestError, ResourceError, SamplingParams, UsageError
from mllama_runtime.backends.ort import OrtBackend, OrtSlots
from PIL import Image

GREEDY = SamplingParams(max_new_tokens=12)


def picture(seed: int, width: int = 100, height: int = 60) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8))


def eight_requests() -> list[Request]:
    """Different lengths; no, one and two pictures of different canvases; text before the picture; sampling options."""
    turns = [
        {"role": "user", "content": "What comes after three?"},
        {"role": "assistant", "content": "four"},
        {"role": "user", "content": [{"type": "text", "text": "And here?"}, {"type": "image"}]},
    ]
    sampled = SamplingParams(max_new_tokens=9, temperature=1.5, top_k=40, seed=3, repetition_penalty=1.1)
    return [
        Request("What color is the circle?", images=[picture(0)], sampling=GREEDY),
        Request("Hello", sampling=SamplingParams(max_new_tokens=3)),
        Request("Which?", images=[picture(1, 40, 40), picture(2, 50, 200)], sampling=GREEDY),
        Request(turns, images=[picture(3, 210, 50)], sampling=GREEDY),
        Request("What comes after six?", system="Be short.", sampling=GREEDY),
        Request("How many shapes are there?", images=[picture(4, 300, 300)], system="Be short.", sampling=sampled),
        Request("text before<|image|>", raw=True, images=[picture(5)], sampling=GREEDY),
        Request("a " * 60, sampling=sampled),
    ]


def test_a_mixed_batch_of_eight_equals_the_rows_alone(engine: Engine) -> None:
    together = engine.generate_batch(eight_requests())
    for request, answer in zip(eight_requests(), together, strict=True):
        [alone] = engine.generate_batch([request])
        assert answer.token_ids == alone.token_ids
        assert answer.text == alone.text
        assert answer.finish_reason == alone.finish_reason
        assert answer.usage == alone.usage


def test_the_order_of_a_batch_does_not_matter(engine: Engine) -> None:
    requests = eight_requests()
    forward = [answer.token_ids for answer in engine.generate_batch(requests)]
    backward = [answer.token_ids for answer in engine.generate_batch(requests[::-1])]
    assert forward == backward[::-1]


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_prefill_in_chunks_changes_nothing(engine: Engine, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = eight_requests()
    whole = [answer.token_ids for answer in engine.generate_batch(requests)]
    monkeypatch.setattr(OrtSlots, "prefill_chunk", chunk)
    assert [answer.token_ids for answer in engine.generate_batch(requests)] == whole


def test_an_encoded_image_is_not_encoded_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = engine.generate("What shape is red?", images=[picture(1)], sampling=GREEDY)
    handle = engine.encode_image(picture(1))
    runs = []
    encode = OrtBackend.encode
    monkeypatch.setattr(OrtBackend, "encode", lambda self, tiles: runs.append(tiles) or encode(self, tiles))
    for question in ("What shape is red?", "How many shapes are there?"):
        answer = engine.generate(question, images=[handle], sampling=GREEDY)
        assert answer.timings.vision_ms == 0
    assert runs == []
    first = engine.generate("What shape is red?", images=[handle], sampling=GREEDY)
    assert first.token_ids == fresh.token_ids
    assert engine.generate("What shape is red?", images=[picture(1)], sampling=GREEDY).token_ids == fresh.token_ids
    assert len(runs) == 1


def test_a_handle_of_another_engine_is_refused(engine: Engine, bundle_of) -> None:
    with Engine.load(bundle_of(), num_threads=1, verify="quick") as other:
        handle = other.encode_image(picture(0))
    with pytest.raises(RequestError, match="another engine"):
        engine.generate("What?", images=[handle])


def test_a_stream_gives_the_answer_in_pieces(engine: Engine) -> None:
    request = {"images": [picture(0)], "sampling": SamplingParams(max_new_tokens=20, logprobs=2)}
    whole = engine.generate("Describe the picture.", **request)
    with engine.stream("Describe the picture.", **request) as stream:
        events = list(stream)
        assert stream.generation().text == whole.text
    assert tuple(event.token_id for event in events) == whole.token_ids
    assert "".join(event.text for event in events) == whole.text
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == whole.finish_reason
    assert whole.logprobs == tuple((event.logprob, event.top_logprobs) for event in events)


def test_closing_a_stream_stops_the_work(engine: Engine) -> None:
    stream = engine.stream("Hello", sampling=SamplingParams(max_new_tokens=500, min_new_tokens=500))
    seen = list(itertools.islice(stream, 3))
    stream.close()
    stream.close()
    assert list(stream) == []
    answer = stream.generation()
    assert (answer.finish_reason, len(answer.token_ids)) == ("cancelled", len(seen))


def test_the_same_seed_gives_the_same_text(engine: Engine) -> None:
    def sampled(seed: int) -> str:
        params = SamplingParams(max_new_tokens=24, min_new_tokens=24, temperature=3.0, seed=seed)
        return engine.generate("Tell me", sampling=params).text

    assert sampled(5) == sampled(5)
    assert sampled(5) != sampled(6)


def test_stop_tokens_and_stop_strings_end_an_answer(engine: Engine) -> None:
    whole = engine.generate("Hello", sampling=SamplingParams(max_new_tokens=8, min_new_tokens=8))
    token_id = whole.token_ids[2]
    first = whole.token_ids.index(token_id)
    stopped = engine.generate("Hello", sampling=SamplingParams(max_new_tokens=8, stop_token_ids=(token_id,)))
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == whole.token_ids[: first + 1]
    piece = whole.text[len(whole.text) // 2 :][:3]
    cut = engine.generate("Hello", sampling=SamplingParams(max_new_tokens=8, min_new_tokens=8, stop=(piece,)))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(piece)]


def test_the_context_is_a_clear_limit(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 64
    monkeypatch.setattr(engine, "model", replace(engine.model, text=replace(engine.model.text, max_seq_len=limit)))
    assert len(engine.tokenizer.encode(" a", special=False)) == 1
    fits = "<|begin_of_text|>" + " a" * (limit - 2)
    answer = engine.generate(fits, raw=True, sampling=SamplingParams(max_new_tokens=10**9))
    assert answer.usage.prompt_tokens == limit - 1
    assert len(answer.token_ids) == 1
    with pytest.raises(RequestError, match=f"at most {limit - 1} tokens.*found {limit} tokens"):
        engine.generate(fits + " a", raw=True)


def test_empty_prompts_and_pictures_without_a_place_are_refused(engine: Engine) -> None:
    for prompt in ("", "  \n"):
        with pytest.raises(RequestError, match="prompt"):
            engine.generate(prompt)
    with pytest.raises(RequestError, match="expected 1, found 0"):
        engine.generate("<|image|>What?", raw=True)
    with pytest.raises(RequestError, match="expected 0, found 1"):
        engine.generate("What?", raw=True, images=[picture(0)])


@pytest.mark.parametrize("images", [np.zeros((4, 4, 3), np.uint8), "photo.jpg", b"bytes", picture(0)], ids=type)
def test_a_single_picture_is_not_taken_apart(engine: Engine, images: object) -> None:
    with pytest.raises(RequestError, match=r"images: is not a list of pictures.*images=\[picture\]"):
        engine.generate("What?", images=images)


def test_arguments_of_a_wrong_kind_are_refused(engine: Engine, bundle_of) -> None:
    with pytest.raises(RequestError, match=r"prompt: cannot be answered.*found int"):
        engine.generate(5)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"sampling: not sampling parameters.*found dict"):
        engine.generate("Hello", sampling={"seed": 1})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="system: is not text"):
        engine.generate("Hello", system=5)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"messages\[0\]"):
        engine.generate([{"role": "user", "content": 5}], system="Be short.")
    with pytest.raises(UsageError, match="verify: unknown check: expected full or quick, found 'fulll'"):
        Engine.load(bundle_of(), verify="fulll")  # type: ignore[arg-type]
    for num_threads in (0, -1, 1025, 10**12):
        with pytest.raises(UsageError, match="num_threads: too few or too many threads: expected 1 to 1024"):
            Engine.load(bundle_of(), num_threads=num_threads)
    with pytest.raises(UsageError, match="backend: unknown back end"):
        Engine.load(bundle_of(), backend="tpu")


def test_a_batch_may_be_any_iterable(engine: Engine) -> None:
    requests = (Request(text, sampling=GREEDY) for text in ("Hello", "What comes after six?"))
    assert len(engine.generate_batch(requests)) == 2  # type: ignore[arg-type]
    assert engine.generate_batch(iter([])) == []  # type: ignore[arg-type]


def test_the_date_of_a_template_can_be_pinned(engine: Engine) -> None:
    def text(date: str | None) -> str:
        prompt = engine.prompt(Request("Hello", system="Be short.", date_string=date))
        return engine.tokenizer.decode(prompt.token_ids)

    assert "Today Date: 01 Jan 2026" in text("01 Jan 2026")
    assert "01 Jan 2026" not in text(None)


@pytest.mark.parametrize("verify", ["full", "quick"])
def test_damage_is_refused_before_use(bundle_of, tmp_path: Path, verify: str) -> None:
    damaged = shutil.copytree(bundle_of(), tmp_path / "damaged")
    data = bytearray((damaged / "decoder.ort.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (damaged / "decoder.ort.onnx").write_bytes(data)
    with pytest.raises(BundleError, match=r"decoder\.ort\.onnx: wrong content"):
        Engine.load(damaged, verify=verify)  # type: ignore[arg-type]


def test_what_an_interrupted_validation_leaves_does_not_stop_a_service(bundle_of, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle_of(), tmp_path / "copy")
    (copy / "reports").mkdir(exist_ok=True)
    (copy / "reports" / ".validation.json.partial-0123abcd").write_text("{")
    with Engine.load(copy, num_threads=1) as engine:
        assert engine.generate("Hello", sampling=GREEDY).token_ids


def test_a_bundle_without_the_back_ends_graphs_says_so(bundle_of, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle_of(), tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["graphs"]["vision_ort"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="no graph vision_ort"), Engine.load(copy):
        pass


@pytest.mark.parametrize(
    ("path", "value", "tensor"),
    [
        (("text", "vocab_size"), 2048, "logits"),
        (("text", "num_kv_heads"), 1, "(past|present|cross)_(key|value)_[0-9]"),
        (("vision", "image_size"), 112, "(pixel_values|cross_(key|value)_[0-9])"),
        (("vision", "max_num_tiles"), 8, "(pixel_values|aspect_ratio_mask|cross_(key|value)_[0-9])"),
    ],
)
def test_a_manifest_that_disagrees_with_its_graphs_is_refused(
    bundle_of, tmp_path: Path, path: tuple[str, str], value: int, tensor: str
) -> None:
    copy = shutil.copytree(bundle_of(), tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["model"][path[0]][path[1]] = value
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=f"{tensor} is not what manifest.json makes of the model"), Engine.load(copy):
        pass


def test_running_out_of_memory_is_a_resource_error(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(self: object, binding: object) -> None:  # a double: a machine whose memory is used up
        raise RuntimeError("Failed to allocate memory for requested buffer of size 99")

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", exhausted)
    with pytest.raises(ResourceError, match="not enough memory for a step of 1 rows"):
        engine.generate("Hello", sampling=GREEDY)


def test_special_tokens_in_a_question_are_text(engine: Engine) -> None:
    prompt = engine.prompt(Request("Is <|image|> or <|eot_id|> a word?", images=[picture(0)]))
    assert prompt.token_ids.count(engine.tokenizer.image_token_id) == 1
    answer = engine.generate("Is <|image|> a word?", sampling=GREEDY)
    assert answer.usage.image_tokens == 0


def test_five_pictures_and_image_tokens_of_real_tiles(engine: Engine) -> None:
    sizes = [(50, 50), (50, 100), (200, 50), (110, 110), (160, 50)]
    images = [picture(seed, *size) for seed, size in enumerate(sizes)]
    answer = engine.generate("What do you see?", images=images, sampling=GREEDY)
    assert answer.usage.image_tokens == (1 + 2 + 4 + 4 + 3) * engine.model.vision.num_patches


def test_an_engine_outside_its_block_is_refused(bundle_of) -> None:
    engine = Engine.load(bundle_of(), num_threads=1)
    with pytest.raises(UsageError, match="not open"):
        engine.generate("Hello")
    with engine:
        assert engine.generate("Hello", sampling=GREEDY).token_ids
        stream = engine.stream("Hello")
    engine.close()
    with pytest.raises(UsageError, match="not open"):
        engine.encode_image(picture(0))
    with pytest.raises(UsageError, match="not open"):
        next(stream)


def test_a_bundle_works_where_it_was_moved_to_and_read_only(bundle_of, tmp_path: Path) -> None:
    moved = shutil.copytree(bundle_of(), tmp_path / "ein Bündel mit Leerzeichen")
    for path in [*moved.iterdir(), moved]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    with Engine.load(moved, num_threads=1) as engine:
        assert engine.generate("Hello", sampling=GREEDY).token_ids
