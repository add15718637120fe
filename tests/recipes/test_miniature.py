"""The miniature checkpoint: published form, loads with unmodified transformers, and answers its sample questions there
once the vision tower takes the published states.

`make demo` and most other tests stand on these files, so what they rely on is pinned here.
"""

import hashlib
import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mllama_exporter.reference_tower import take_states
from PIL import Image
from safetensors import safe_open

RECIPE = Path(__file__).parents[2] / "recipes" / "miniature"
CHECKPOINT = RECIPE / "checkpoint"
MAX_CHECKPOINT_BYTES = 20_000_000


@pytest.fixture(scope="module")
def processor() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, dict[str, Any]]:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, info = transformers.MllamaForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float32, output_loading_info=True
    )
    take_states(model.model.vision_model, "published")
    return model, info


@pytest.fixture(scope="module")
def training() -> Iterator[dict[str, ModuleType]]:
    """The training modules, which import one another by bare names as scripts in one folder do."""
    names = ("pictures", "conversations", "tokenizer", "batches", "model", "objective")
    pytest.importorskip("transformers")
    sys.path.insert(0, str(RECIPE))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(RECIPE))
        for name in names:
            sys.modules.pop(name, None)


def config() -> dict[str, Any]:
    return json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))


def tensor_shapes() -> dict[str, tuple[list[int], str]]:
    index = json.loads((CHECKPOINT / "model.safetensors.index.json").read_text(encoding="utf-8"))
    found = {}
    for name, file_name in index["weight_map"].items():
        with safe_open(CHECKPOINT / file_name, framework="np") as shard:
            found[name] = (shard.get_slice(name).get_shape(), shard.get_slice(name).get_dtype())
    return found


def sample_questions() -> list[dict[str, str]]:
    lines = (RECIPE / "pictures" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def model_card_answer(processor: Any, model: Any, content: Any, image: Image.Image | None) -> str:
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(image, prompt, add_special_tokens=False, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=60)
    text = str(processor.decode(output[0]))
    return text.rsplit("<|end_header_id|>\n\n", 1)[1]


def test_key_names_and_shapes_are_the_published_ones() -> None:
    tensors = tensor_shapes()
    allowed = re.compile(r"language_model\.(model|lm_head)\.|vision_model\.|multi_modal_projector\.(weight|bias)$")
    assert [name for name in tensors if not allowed.match(name)] == []
    assert {dtype for _, dtype in tensors.values()} == {"BF16"}
    text = config()["text_config"]
    rows = text["vocab_size"]
    assert tensors["language_model.lm_head.weight"][0] == [rows, text["hidden_size"]]
    assert tensors["language_model.model.embed_tokens.weight"][0] == [rows + 8, text["hidden_size"]]
    for layer in text["cross_attention_layers"]:
        assert f"language_model.model.layers.{layer}.cross_attn.k_norm.weight" in tensors


def test_linear_inputs_fill_whole_quantization_blocks() -> None:
    linear = re.compile(r"(proj|fc1|fc2|lm_head|multi_modal_projector)\.weight$")
    widths = {name: shape[-1] for name, (shape, _) in tensor_shapes().items() if linear.search(name)}
    assert len(widths) > 40
    assert {name: width for name, width in widths.items() if width % 128} == {}


def test_config_is_in_the_published_form() -> None:
    found = config()
    assert found["torch_dtype"] == "bfloat16"
    assert found["image_token_index"] == found["text_config"]["vocab_size"]
    assert found["text_config"]["rope_theta"] == 500000.0
    assert found["text_config"]["rope_scaling"]["rope_type"] == "llama3"
    assert found["vision_config"]["vision_output_dim"] == 128 * (
        1 + len(found["vision_config"]["intermediate_layers_indices"])
    )


def test_size_stays_small() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= MAX_CHECKPOINT_BYTES


def test_loads_without_missing_or_unexpected_keys(loaded: tuple[Any, dict[str, Any]]) -> None:
    model, info = loaded
    assert {key: value for key, value in info.items() if value} == {}
    rope = model.config.text_config.rope_parameters
    assert (rope["rope_type"], rope["rope_theta"], rope["factor"]) == ("llama3", 500000.0, 8.0)


def test_every_gate_is_open(loaded: tuple[Any, dict[str, Any]]) -> None:
    gates = {name: value for name, value in loaded[0].named_parameters() if "gate" in name and value.numel() == 1}
    assert len(gates) == 11  # 2 of each cross layer, 2 of each global layer, 3 of the embeddings
    assert [name for name, value in gates.items() if abs(value.item()) < 1e-3] == []


def test_picture_token_has_the_id_behind_the_vocabulary(processor: Any) -> None:
    vocab_size = config()["text_config"]["vocab_size"]
    assert processor.tokenizer.convert_tokens_to_ids("<|image|>") == vocab_size
    assert len(processor.tokenizer) == vocab_size + 1
    assert processor.tokenizer("Hello")["input_ids"][0] == config()["text_config"]["bos_token_id"]


def test_tokenizer_gives_every_text_back(processor: Any) -> None:
    text = 'What color is it? Größe 12345 \t\n\n  {"x": [1.5]} 写真 \U0001f600 don\'t'
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.decode(ids) == text


@pytest.mark.parametrize("index", range(6))
def test_model_card_snippet_answers_right(processor: Any, loaded: tuple[Any, dict[str, Any]], index: int) -> None:
    sample = sample_questions()[2 * index]
    content = [{"type": "image"}, {"type": "text", "text": sample["question"]}]
    with Image.open(RECIPE / "pictures" / sample["image"]) as image:
        answer = model_card_answer(processor, loaded[0], content, image)
    assert answer == sample["answer"] + "<|eot_id|>"


def test_text_only_question_is_answered(processor: Any, loaded: tuple[Any, dict[str, Any]]) -> None:
    answer = model_card_answer(processor, loaded[0], "What comes after three?", None)
    assert answer == "Four comes after three.<|eot_id|>"


def test_pictures_are_a_pure_function_of_the_seed(pictures: ModuleType) -> None:
    digest = hashlib.sha256()
    for seed in range(20):
        image = pictures.render(pictures.scene_from_seed(seed))
        digest.update(repr(image.size).encode() + image.tobytes())
    assert digest.hexdigest() == "9707eb021c34e0ac6764d3048b75e4fba2d4421ab1a06bd5d9fda8593abeee59"


def test_training_sees_the_tensors_of_the_image_processor(training: dict[str, ModuleType], processor: Any) -> None:
    batches, scenes = training["batches"], training["pictures"]
    drawn = batches.draw_pictures(range(60))
    found = batches.vision_inputs(drawn.tiles[:, None], drawn.canvases[:, None])
    images = [[scenes.render(scenes.scene_from_seed(seed))] for seed in range(60)]
    expected = processor.image_processor(images, return_tensors="pt")
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape
        assert bool((tensor == expected[name]).all()), name


def test_training_sees_the_prompts_of_the_chat_template(training: dict[str, ModuleType]) -> None:
    encoder = training["batches"].Encoder(training["tokenizer"].build_tokenizer())
    assert training["objective"].matches_template(encoder, CHECKPOINT, count=60)


def test_training_sees_the_published_states(training: dict[str, ModuleType]) -> None:
    """Whatever the installed transformers takes: block 2 gets no gradient from the states before blocks 1 and 2."""
    torch = pytest.importorskip("torch")
    tower = training["model"].build_model(0).model.vision_model
    batches = training["batches"]
    drawn = batches.draw_pictures(range(2))
    features = tower(**batches.vision_inputs(drawn.tiles[:, None], drawn.canvases[:, None])).last_hidden_state
    features[..., tower.config.hidden_size :].square().mean().backward()
    reached = [bool(layer.mlp.fc1.weight.grad.any()) for layer in tower.transformer.layers]
    assert tower.config.intermediate_layers_indices == [1, 2]
    assert reached == [True, True, False]
    assert torch.isfinite(features).all()


def test_packed_conversations_are_learned_as_if_alone(training: dict[str, ModuleType]) -> None:
    torch = pytest.importorskip("torch")
    batches, objective = training["batches"], training["objective"]
    encoder = batches.Encoder(training["tokenizer"].build_tokenizer())
    losses = objective.Objective(training["model"].build_model(0).eval(), batches.draw_pictures(range(1)))
    source = objective.Source(losses.pictures, encoder, batch=1, row_tokens=256, seed=0)
    (batch, chosen), rows = source.one_picture(), []
    source.rng.seed(0)
    source.rows = lambda makers: rows.extend(batches.fill_row(make, 256) for make in makers)
    source.one_picture()
    assert min(len(row) for row in rows) >= 2
    total, num_tokens = 0.0, 0
    with torch.no_grad():
        packed, _ = losses.with_pictures(batch, chosen)
        for index, row in enumerate(rows):
            for conversation in row:
                alone = batches.pack([[conversation]], len(conversation.ids))
                loss, _ = losses.with_pictures(alone, chosen[index : index + 1])
                count = int((alone.targets != batches.IGNORED).sum())
                total, num_tokens = total + loss.item() * count, num_tokens + count
    assert num_tokens == int((batch.targets != batches.IGNORED).sum())
    assert packed.item() == pytest.approx(total / num_tokens, abs=1e-4)  # float32, sums in another order


def test_questions_are_the_same_every_time(pictures: ModuleType) -> None:
    first, second = (list(pictures.held_out("held_out", 200)) for _ in range(2))
    assert first == second
    assert {example.question.kind for example in first} == set(pictures.QUESTION_KINDS)


def test_all_canvases_occur_and_the_processor_agrees(pictures: ModuleType, processor: Any) -> None:
    seen = set()
    for example in pictures.held_out("held_out", 100):
        image = pictures.render(example.scene)
        ratio = int(processor.image_processor(image, return_tensors="pt")["aspect_ratio_ids"])
        assert tuple(config()["vision_config"]["supported_aspect_ratios"][ratio - 1]) == example.scene.canvas
        seen.add(example.scene.canvas)
    assert seen == set(pictures.CANVASES)


def test_splits_share_no_seed(pictures: ModuleType) -> None:
    spans = sorted((span.start, span.stop) for span in pictures.SPLITS.values())
    assert all(left[1] <= right[0] for left, right in itertools.pairwise(spans))
    assert len(list(pictures.held_out("held_out", 2000))) == 2000


def test_there_are_enough_samples() -> None:
    samples = sample_questions()
    assert len(samples) >= 12
    assert len({sample["image"] for sample in samples}) == 6


def test_recorded_accuracy_meets_the_target() -> None:
    results = json.loads((RECIPE / "RESULTS.json").read_text(encoding="utf-8"))
    assert results["held_out"]["questions"] >= 1000
    assert results["held_out"]["accuracy"] >= 0.95
