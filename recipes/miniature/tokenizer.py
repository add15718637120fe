"""Builds the miniature's tokenizer and processor files: the part of the checkpoint that is not weights.

A byte-level BPE with Llama 3's pre-tokenizer, trained on the questions, the answers and `corpus.txt`; then Llama 3's
special tokens by name. Run before `train.py`, which copies these files next to the weights.
"""

import argparse
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from conversations import MONTHS, NEUTRAL_SYSTEMS, SHORT_SYSTEMS, text_pairs
from pictures import SPLITS, TILE, ask, scene_from_seed
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
NUM_BASE_TOKENS = 1008
# Llama 3's way to cut text into words, as its tokenizer.json publishes it.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    *(f"<|reserved_special_token_{index}|>" for index in range(2, 7)),
)
IMAGE_TOKEN = "<|image|>"
VOCAB_SIZE = NUM_BASE_TOKENS + len(SPECIAL_TOKENS)  # the picture's token comes behind it and has no logit
TOKEN_IDS = {name: NUM_BASE_TOKENS + index for index, name in enumerate((*SPECIAL_TOKENS, IMAGE_TOKEN))}


def training_text() -> Iterator[str]:
    yield from (HERE / "corpus.txt").read_text(encoding="utf-8").split("\n\n")
    for question, answer, _ in text_pairs():
        yield f"{question}\n\n{answer}"
    yield from (*NEUTRAL_SYSTEMS, *SHORT_SYSTEMS)
    for number in range(1000):
        yield f"{number}"
    for month in MONTHS:  # the words of every prompt, many times
        for day in range(1, 31):
            yield f"Cutting Knowledge Date: December 2023\nToday Date: {day:02d} {month} {2024 + day % 5}\n\n"
            yield from ("system", "user", "assistant", "ipython", "\n\n")
    rng = random.Random(0)
    for seed in SPLITS["train"][:3000]:
        question = ask(scene_from_seed(seed), rng)
        yield f"{question.question}\n\n{question.answer} {question.short}"


def build_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_BASE_TOKENS,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    if tokenizer.get_vocab_size() != NUM_BASE_TOKENS:
        raise ValueError(f"the corpus gives {tokenizer.get_vocab_size()} tokens, {NUM_BASE_TOKENS} are wanted")
    tokenizer.add_special_tokens(
        [AddedToken(name, special=True, normalized=False) for name in (*SPECIAL_TOKENS, IMAGE_TOKEN)]
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    begin = SPECIAL_TOKENS[0]
    template = processors.TemplateProcessing(
        single=f"{begin} $A", pair=f"{begin} $A {begin}:1 $B:1", special_tokens=[(begin, TOKEN_IDS[begin])]
    )
    byte_level = processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=True)
    tokenizer.post_processor = processors.Sequence([byte_level, template])
    return tokenizer


def special_tokens_map() -> dict[str, str]:
    return {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}


def tokenizer_config() -> dict[str, object]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        "added_tokens_decoder": {str(number): {"content": name, **flags} for name, number in TOKEN_IDS.items()},
        **special_tokens_map(),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "processor_class": "MllamaProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def preprocessor_config() -> dict[str, object]:
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "MllamaImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_image_tiles": 4,
        "processor_class": "MllamaProcessor",
        "resample": 2,
        "rescale_factor": 1 / 255,
        "size": {"height": TILE, "width": TILE},
    }


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_processor_files(folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config())
    write_json(folder / "special_tokens_map.json", special_tokens_map())
    write_json(folder / "preprocessor_config.json", preprocessor_config())
    shutil.copyfile(HERE / "template.jinja", folder / "chat_template.jinja")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "checkpoint", help="folder of the checkpoint")
    write_processor_files(parser.parse_args().out, build_tokenizer())


if __name__ == "__main__":
    main()
