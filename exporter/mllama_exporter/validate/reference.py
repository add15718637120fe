"""The reference: transformers in float32, one request at a time, so that nothing is ever padded.

Where the installed transformers takes other vision states than the bundle, hooks put the right ones in: see
`reference_tower`. For `meta` semantics, which transformers does not have, hooks on the same model mask the attention
branch of its cross-attention layers for tokens that see no tile; its own code masks the MLP branch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from mllama_runtime.config import MaskSemantics, VisionStates
from mllama_runtime.errors import EnvironmentFault, RequestError
from mllama_runtime.images import load_image
from numpy.typing import NDArray

from mllama_exporter.reference_tower import installed_states, take_states
from mllama_exporter.validate.samples import Sample
from mllama_exporter.validate.spots import Side

try:
    transformers: Any = importlib.import_module("transformers")
except ImportError as error:
    raise EnvironmentFault(
        "transformers, the reference, is missing or broken", found=error, hint='pip install "mllama-deploy[export]"'
    ) from error
if not hasattr(transformers.DynamicCache(), "layers"):
    raise EnvironmentFault(
        "transformers, the reference, is too old",
        expected="4.54 or newer",
        found=transformers.__version__,
        hint='pip install "mllama-deploy[export]"',
    )

ATTENTION = "sdpa"  # transformers' default; its eager form holds every score: 2.6 GB a layer for a full-size picture
Array = NDArray[np.float32]
_STATE_RANKS = {"projector": 3}  # axes of a state behind that of pictures or prompts


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceInputs:
    """A sample as the reference's processor prepares it: I pictures, T tiles, S tokens, P pixels of a tile's side."""

    sample: Sample
    text: str
    token_ids: tuple[int, ...]  # S
    pixel_values: Array  # [I, T, 3, P, P]
    aspect_ratio_ids: NDArray[np.int64]  # [I]
    aspect_ratio_mask: NDArray[np.int64]  # [I, T]
    cross_attention_mask: NDArray[np.int64]  # [S, I, T]


@dataclass(frozen=True, slots=True, eq=False)
class ReferenceRun:
    """What the reference makes of a sample in N greedy steps: G key/value heads, D head_dim, R rows of a tile."""

    inputs: ReferenceInputs
    continuation: tuple[int, ...]  # N, an end token included
    logits: Array  # [N, vocab], of the prompt's last token and then of every generated one but the last
    cross: Mapping[str, Array]  # cross_key_i, cross_value_i: [1, G, I*T*R, D]
    past: Mapping[str, Array]  # past_key_l, past_value_l: [1, G, S+N-1, D]
    states: Mapping[str, Array]  # of the residual streams after the prompt, as `spots` names them; or none


class ReferenceProcessor:
    """A checkpoint's own processor: chat template, tokenizer and image processor."""

    def __init__(self, folder: Path) -> None:
        with _quiet():
            self._processor = transformers.AutoProcessor.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )

    def inputs(self, sample: Sample) -> ReferenceInputs:
        """Raises RequestError when the chat template refuses the sample."""
        text = sample.raw_text
        if self._processor.chat_template is not None:
            try:
                text = self._processor.apply_chat_template(sample.messages, add_generation_prompt=True)
            except jinja2.TemplateError as error:
                what = "the checkpoint's chat template refuses it"
                raise RequestError(what, where=sample.name, found=error) from error
        images = [load_image(image) for image in sample.images] or None
        found = self._processor(images=images, text=text, add_special_tokens=False, return_tensors="np")
        tokens = found["input_ids"][0]
        keys = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")
        arrays: list[Any] = [found[key][0] if images else np.zeros((0,)) for key in keys]
        return ReferenceInputs(sample, text, tuple(map(int, tokens)), *arrays)

    def text(self, token_ids: tuple[int, ...]) -> str:
        """An answer's text without special tokens."""
        return str(self._processor.decode(list(token_ids), skip_special_tokens=True))


class ReferenceModel:
    """A checkpoint's weights in transformers' own model, 4 bytes a parameter in memory.

    folder: a Hugging Face checkpoint; with `weights`, by their published names, only its configuration is read.
    vision_states: what its tower takes, corrected if the installed transformers takes others; None for text alone.
    num_layers: the first text layers to keep, as `mllama export --layers` does.

    Raises:
        EnvironmentFault: the installed transformers cannot load it, or its vision tower is of no known kind.
    """

    def __init__(
        self,
        folder: Path,
        *,
        mask_semantics: MaskSemantics,
        vision_states: VisionStates | None,
        num_layers: int | None = None,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        with _quiet():
            config = transformers.MllamaConfig.from_pretrained(folder, local_files_only=True)
            text = config.text_config
            if num_layers is not None:
                text.num_hidden_layers = num_layers
                text.cross_attention_layers = [layer for layer in text.cross_attention_layers if layer < num_layers]
            try:
                self._model = transformers.MllamaForConditionalGeneration.from_pretrained(
                    folder if weights is None else None,
                    config=config,
                    state_dict=weights,
                    attn_implementation=ATTENTION,
                    local_files_only=True,
                    **{_dtype_option(): torch.float32},
                ).eval()
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise EnvironmentFault(
                    f"transformers {transformers.__version__} cannot load this checkpoint",
                    where=folder,
                    found=f"{type(error).__name__}: {error}",
                    hint="a newer transformers may have saved it: pip install --upgrade transformers",
                ) from error
        if vision_states is not None and vision_states != installed_states():
            take_states(self._model.model.vision_model, vision_states)
        self._cross_layers = frozenset(text.cross_attention_layers)
        # The checkpoint's own sampling options are no part of a greedy reference.
        generation = self._model.generation_config
        if weights is not None and (folder / "generation_config.json").is_file():
            generation = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
        eos, pad = generation.eos_token_id, generation.pad_token_id
        self._model.generation_config = transformers.GenerationConfig(eos_token_id=eos, pad_token_id=pad)
        if mask_semantics == "meta":
            self._mask_attention_branches()

    def run(
        self, inputs: ReferenceInputs, max_steps: int, watched: Mapping[str, tuple[str, Side]] | None = None
    ) -> ReferenceRun:
        """Prefill, then at most max_steps greedy tokens, ended by an end token.

        watched: state -> the module that takes it in or gives it out, for samples whose layers are measured.
        """
        depth = inputs.sample.depth
        with self._watched(watched or {} if depth == "layers" else {}) as states:
            output = self._generate(inputs, max_steps, return_dict_in_generate=True, output_logits=True)
        past: dict[str, Array] = {}
        cross: dict[str, Array] = {}
        for layer, cache in enumerate(output.past_key_values.layers):
            if depth != "answers" and cache.keys is not None:  # of cross-attention layers it is, for text alone
                prefix, tensors = ("cross", cross) if layer in self._cross_layers else ("past", past)
                tensors[f"{prefix}_key_{layer}"] = cache.keys.numpy()
                tensors[f"{prefix}_value_{layer}"] = cache.values.numpy()
        continuation = tuple(output.sequences[0, len(inputs.token_ids) :].tolist())
        return ReferenceRun(inputs, continuation, torch.cat(output.logits).float().numpy(), cross, past, states)

    @contextmanager
    def _watched(self, modules: Mapping[str, tuple[str, Side]]) -> Iterator[dict[str, Array]]:
        """What these modules take in, or give out, when they first run; a module the model lacks gives nothing."""
        states: dict[str, Array] = {}
        hooks, known = [], dict(self._model.named_modules())

        def keep(state: str, given: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            tensor = torch.cat(given, dim=-1) if isinstance(given, tuple) else given
            states.setdefault(state, tensor.float().numpy().reshape(-1, *tensor.shape[-_STATE_RANKS.get(state, 2) :]))

        for state, (name, side) in modules.items():
            if (module := known.get(name)) is None:
                continue
            if side == "input":
                hooks.append(module.register_forward_pre_hook(lambda _, args, state=state: keep(state, args[0])))
            else:
                hooks.append(module.register_forward_hook(lambda _, args, output, state=state: keep(state, output)))
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    def answer(self, inputs: ReferenceInputs, max_new_tokens: int) -> tuple[int, ...]:
        """Greedy token ids, an end token included."""
        return tuple(self._generate(inputs, max_new_tokens)[0, len(inputs.token_ids) :].tolist())

    def _generate(self, inputs: ReferenceInputs, max_new_tokens: int, **options: bool) -> Any:
        token_ids = torch.tensor([inputs.token_ids])
        tensors = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
        if inputs.sample.images:
            for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask"):
                tensors[name] = torch.from_numpy(getattr(inputs, name)[None])
        with torch.inference_mode(), _quiet():
            return self._model.generate(**tensors, max_new_tokens=max_new_tokens, do_sample=False, **options)

    def _mask_attention_branches(self) -> None:
        for layer in self._cross_layers:
            decoder_layer = self._model.model.language_model.layers[layer]
            mask: list[torch.Tensor | None] = [None]  # [1, 1, S, 1] of the call under way; None for text alone

            def remember(
                module: object, args: object, kwargs: dict[str, Any], mask: list[torch.Tensor | None] = mask
            ) -> None:
                mask[0] = kwargs["full_text_row_masked_out_mask"]

            def drop(
                module: object, args: object, output: tuple[Any, ...], mask: list[torch.Tensor | None] = mask
            ) -> tuple[Any, ...] | None:
                return None if mask[0] is None else (output[0] * mask[0][:, 0], *output[1:])

            decoder_layer.register_forward_pre_hook(remember, with_kwargs=True)
            decoder_layer.cross_attn.register_forward_hook(drop)


def _dtype_option() -> str:
    """What `from_pretrained` calls the weights' type: `torch_dtype` until transformers 4.55."""
    return "dtype" if hasattr(transformers.MllamaConfig(), "dtype") else "torch_dtype"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, and its notes on layers left out."""
    logging = transformers.utils.logging
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
