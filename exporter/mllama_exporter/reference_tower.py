"""transformers' vision tower as a reference: which intermediate states it takes, and how it is made to take others.

Meta's code keeps the state before block i for every i in `intermediate_layers_indices`, and so did transformers until
4.54. transformers 4.55 gives the last block's state once for each index, and 4.56 and later the state after block i
(pull requests 39643 and 40083). What is installed is found by running a tiny tower: its version is never asked for, and
the installation itself is never touched.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any, Literal, NoReturn, get_args

import torch
from mllama_runtime.config import VisionStates
from mllama_runtime.errors import EnvironmentFault

TakenStates = Literal[VisionStates, "other"]
"""What a vision tower takes; `other` is neither the one nor the other, as in transformers 4.55."""

States = dict[int, torch.Tensor]
"""Before or after the blocks of these indices: [B * I, T * rows, V]."""

_TINY = {  # of a tower that runs in a millisecond; five rows a tile, which are padded to eight
    "hidden_size": 8,
    "attention_heads": 1,
    "intermediate_size": 8,
    "num_hidden_layers": 4,
    "num_global_layers": 1,
    "intermediate_layers_indices": [1, 2],
    "vision_output_dim": 24,
    "image_size": 4,
    "patch_size": 2,
    "num_channels": 1,
    "max_num_tiles": 2,
    "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
}


def take_states(tower: Any, semantics: VisionStates) -> None:
    """Make a transformers MllamaVisionModel take its intermediate states as `semantics` say, for good.

    Everything else that the tower does is left alone: the final state keeps its place in front, and the intermediate
    states stand behind it, interleaved. Hooks on the blocks keep the states, and one on the tower puts them in.

    Raises:
        EnvironmentFault: here or when the tower runs, the tower is not built as that of a known version.
    """
    indices = list(tower.config.intermediate_layers_indices)
    before, after = _watch(tower, "transformer", indices)

    def put_in(_: object, args: object, output: Any) -> Any:
        features = output[0]  # [B, I, T, P, V * (1 + intermediate layers)]
        states = _interleaved(before if semantics == "published" else after, indices, features)
        before.clear()
        after.clear()
        features = torch.cat([features[..., : tower.config.hidden_size], states], dim=-1)
        if isinstance(output, tuple):
            return (features, *output[1:])
        output.last_hidden_state = features
        return output

    tower.register_forward_hook(put_in)


@cache
def installed_states() -> TakenStates:
    """What the installed transformers takes.

    Raises:
        EnvironmentFault: its tower is not built as that of a known version, so that it can neither be told nor
            corrected.
    """
    try:
        for semantics in get_args(VisionStates):
            take_states(tower := _tiny_tower(), semantics)
            if states_of(tower) != semantics:
                _refuse(f"a tower that was made to take {semantics} states does not")
        return states_of(_tiny_tower())
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        _refuse(f"{type(error).__name__}: {error}")


def states_of(tower: Any) -> TakenStates:
    """What a transformers MllamaVisionModel takes, found by running it on noise.

    Raises:
        EnvironmentFault: as `take_states`, or what stands in front of its output is not the final state.
    """
    config, generator = tower.config, torch.Generator().manual_seed(0)
    indices, dim, last = list(config.intermediate_layers_indices), config.hidden_size, config.num_global_layers - 1
    before, after = _watch(tower, "transformer", indices)
    _, final = _watch(tower, "global_transformer", [last])
    size, num_tiles = config.image_size, config.max_num_tiles
    pixels = torch.randn(1, 1, num_tiles, config.num_channels, size, size, generator=generator)
    ids, mask = torch.ones(1, 1, dtype=torch.int64), torch.ones(1, 1, num_tiles, dtype=torch.int64)
    with torch.no_grad():
        features = tower(pixel_values=pixels, aspect_ratio_ids=ids, aspect_ratio_mask=mask)[0]
    if not torch.equal(features[..., :dim], _in_tiles(final[last], features)):
        _refuse("the final state does not stand in front of the intermediate ones")
    taken: Mapping[VisionStates, States] = {"published": before, "transformers-4.56": after}
    for name, states in taken.items():
        if torch.equal(features[..., dim:], _interleaved(states, indices, features)):
            return name
    return "other"


def _tiny_tower() -> Any:
    """A tower with random weights, which leaves torch's own generator as it was."""
    transformers = importlib.import_module("transformers")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        config = transformers.MllamaConfig(vision_config=dict(_TINY)).vision_config
        tower = transformers.MllamaVisionModel(config).eval()
        for parameter in tower.parameters():
            parameter.normal_()
    return tower


def _watch(tower: Any, encoder: str, indices: Sequence[int]) -> tuple[States, States]:
    """The states before and after these blocks of an encoder, filled in when the tower runs."""
    before: States = {}
    after: States = {}

    def keep_input(index: int, _: object, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        before[index] = args[0] if args else kwargs.get("hidden_states", kwargs.get("hidden_state"))

    def keep_output(index: int, _: object, args: object, output: Any) -> None:
        after[index] = output[0] if isinstance(output, tuple) else output

    blocks = getattr(getattr(tower, encoder, None), "layers", ())
    for index in set(indices):
        if index >= len(blocks):
            _refuse(f"{encoder}.layers.{index} is missing")
        blocks[index].register_forward_pre_hook(partial(keep_input, index), with_kwargs=True)
        blocks[index].register_forward_hook(partial(keep_output, index))
    return before, after


def _interleaved(states: States, indices: Sequence[int], features: Any) -> torch.Tensor:
    """The states as they stand in the tower's own output, `features`: [B, I, T, P, V * intermediate layers]."""
    if not isinstance(features, torch.Tensor) or features.ndim != 5:
        _refuse("the output is no tensor of five axes")
    if any(not isinstance(states.get(index), torch.Tensor) for index in indices):
        _refuse("a block does not take in its state, or does not give it out, as it did")
    interleaved = torch.stack([_in_tiles(states[index], features) for index in indices], dim=-1).flatten(-2)
    dim, width = states[indices[0]].shape[-1], features.shape[-1]
    if dim + interleaved.shape[-1] != width:
        _refuse(f"the output is {width} wide, and {len(indices)} intermediate states of {dim} do not fit")
    return interleaved


def _in_tiles(state: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """[B * I, T * rows, V] -> [B, I, T, P, V], as `features` are: without the rows that fill a tile up."""
    *lead, num_patches, _ = features.shape
    return state.reshape(*lead, -1, state.shape[-1])[..., :num_patches, :]


def _refuse(found: str) -> NoReturn:
    version = importlib.import_module("transformers").__version__
    raise EnvironmentFault(
        "cannot tell which intermediate states its vision tower takes",
        where=f"transformers {version}",
        expected="the tower of 4.54 to 5.23",
        found=found,
        hint="install one of these, the reference for validation: pip install transformers==5.23.0",
    )
