"""The production entrance: a bundle and requests in, text out.

with Engine.load("bundle") as engine:
    print(engine.generate("What is this?", images=["photo.jpg"]).text)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from mllama_runtime.backends import Backend, Features, backend_from_bundle
from mllama_runtime.bundle import Bundle
from mllama_runtime.chat import ChatTemplate, messages_from, tools_from
from mllama_runtime.contract import MAX_LOGITS
from mllama_runtime.decode import FinishReason, Row, TokenEvent
from mllama_runtime.engine_record import Limits
from mllama_runtime.errors import BundleError, MllamaError, RequestError, UsageError
from mllama_runtime.fields import load_json, parse
from mllama_runtime.images import ImageSource, load_image
from mllama_runtime.loop import Loop, answer
from mllama_runtime.memory import MemoryPlan
from mllama_runtime.preprocessing import ImageTiles, PreprocessorConfig, preprocess
from mllama_runtime.prompt import Prompt, image_visibility, prompt_from_messages, prompt_from_text
from mllama_runtime.sampling import Sampler, SamplingParams
from mllama_runtime.streaming import TextStream
from mllama_runtime.tokenizer import Tokenizer, checked_text
from mllama_runtime.tokens import HostTokens, TokenSlots


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """generation.json: the tokens that end an answer, and the special tokens a chat template may name by a variable."""

    eos_token_ids: tuple[int, ...]
    token_variables: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class EncodedImage:
    """A picture the vision graph has already seen; give it to any number of prompts of the same engine."""

    key: str
    num_tiles: int
    features: Features = field(repr=False)
    engine: Engine = field(repr=False)


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to answer.

    Args:
        prompt: a question, put to the model as a user's message; or a conversation, as a list of
            {"role", "content"} messages in the Hugging Face form (see `chat.messages_from`).
        images: pictures, each a path, bytes, Pillow image, uint8 array or `EncodedImage`. With a question they stand
            before it; with a conversation they fill its image parts in order.
        system: a system message to put first.
        tools: tools the model may call, as JSON-schema functions.
        sampling: how to choose tokens.
        date_string: the date a chat template writes, such as "01 Jan 2026"; by default today's, so that a prompt with
            a system message is another one tomorrow.
        raw: continue `prompt` as it stands, without chat template; `<|image|>` in it is a picture's place. Bundles of
            base models have no template and always do this.
    """

    prompt: str | Sequence[Mapping[str, Any]]
    images: Sequence[ImageSource | EncodedImage] = ()
    system: str | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    sampling: SamplingParams = SamplingParams()  # noqa: RUF009 - frozen
    date_string: str | None = None
    raw: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request; `image_tokens` are rows of picture patches the decoder attends to."""

    prompt_tokens: int
    image_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Wall-clock milliseconds.

    `vision_ms` is 0 when every picture was an `EncodedImage`; on a GPU it is part of `prefill_ms`.
    """

    preprocess_ms: float
    vision_ms: float
    prefill_ms: float
    decode_ms_per_token: float


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer. `token_ids` include the end token; `finish_reason` is "cancelled" when the stream was closed early."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | Literal["cancelled"]
    usage: Usage
    timings: Timings
    logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...] | None
    notices: tuple[str, ...]


class Engine:
    """A bundle ready to answer, as a context manager; nothing is loaded onto a device before it is entered.

    One engine serves one caller at a time.
    """

    def __init__(self, bundle: Bundle, backend: Backend, *, speculate: int = 0) -> None:
        if not 0 <= speculate < MAX_LOGITS:
            raise UsageError(
                "not a draft's length", where="speculate", expected=f"0 to {MAX_LOGITS - 1}", found=speculate
            )
        self.bundle, self.model = bundle, bundle.manifest.model
        self.tokenizer = Tokenizer.from_file(bundle.path("tokenizer.json"))
        self._generation = parse(
            GenerationConfig, _json(bundle, "generation.json"), where="generation.json", error=BundleError
        )
        self._template = _template(bundle, self.tokenizer, self._generation)
        self.preprocessor = None if self.model.is_text_only else _preprocessor(bundle)
        self._backend, self._is_open, self._speculate = backend, False, speculate
        self._loop: Loop | None = None

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        backend: str = "auto",
        num_threads: int | None = None,
        verify: Literal["full", "quick"] = "full",
        speculate: int = 0,
        limits: Limits | None = None,
    ) -> Engine:
        """Open a bundle.

        Args:
            bundle: its folder.
            backend: "cpu", "cuda", "tensorrt", "tensorrt-rtx", or "auto": TensorRT where there are a GPU and engines
                for it in the bundle, else the CPU.
            num_threads: CPU threads; by default all the process may use.
            verify: "full" hashes every file against the manifest before anything is loaded; "quick" compares sizes
                and headers, for a service that ran `mllama verify` before.
            speculate: tokens of a draft that is taken from the text so far and checked in one step, while one request
                runs alone; 0 makes none. The answer is the same; copying answers take fewer steps.
            limits: slots, tokens and tiles that "cuda" plans memory for, by default four slots of at most 8,192 tokens
                and one picture each; an engine has those it was built for.

        Raises:
            BundleError: the bundle is missing, damaged or of another version.
            EnvironmentFault: the back end's package, or a GPU, is missing.
            UsageError: an argument is none of the above.
        """
        if verify not in ("full", "quick"):
            raise UsageError("unknown check", where="verify", expected="full or quick", found=repr(verify))
        opened = Bundle.open(Path(bundle), full=verify == "full")
        return cls(opened, backend_from_bundle(opened, backend, num_threads, limits=limits), speculate=speculate)

    def __enter__(self) -> Self:
        self._backend.__enter__()
        self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open, self._loop = False, None
        self._backend.__exit__(kind, error, trace)

    def close(self) -> None:
        """Free what entering took; a second time does nothing."""
        self.__exit__(None, None, None)

    @property
    def backend_name(self) -> str:
        """What runs the graphs, such as "cpu" or "tensorrt-rtx"."""
        return self._backend.name

    def memory(self) -> MemoryPlan:
        """Every byte the open engine has taken on its device, and of page-locked memory.

        Raises:
            UsageError: the engine is closed, or its back end takes memory as it goes.
        """
        self._require_open()
        return self._backend.memory()

    def generate(self, prompt: str | Sequence[Mapping[str, Any]], **options: Any) -> Generation:
        """Answer one request; the arguments are `Request`'s. Raises RequestError, ImageError, ResourceError."""
        return self.generate_batch([Request(prompt, **options)])[0]

    def generate_batch(self, requests: Sequence[Request]) -> list[Generation]:
        """Answer several requests together, each exactly as if it were alone.

        A request that cannot be answered raises for all of them; see `generate` for what.
        """
        if not (requests := list(requests)):
            return []
        with self._stream(requests) as stream:
            for _ in stream:
                pass
            return stream.generations()

    def stream(self, prompt: str | Sequence[Mapping[str, Any]], **options: Any) -> Stream:
        """Answer one request token by token; the arguments are `Request`'s.

        The prompt and the pictures are checked and encoded here; prefill starts with the first `next`.
        """
        return self._stream([Request(prompt, **options)])

    def encode_image(self, image: ImageSource) -> EncodedImage:
        """Run the vision graph on a picture once, for any number of prompts. Raises ImageError."""
        return self._encode(image, _Clock())

    def tiles(self, image: ImageSource) -> ImageTiles:
        """A picture as the vision graph takes it. Raises ImageError, and RequestError where the model is text-only."""
        if self.preprocessor is None:
            raise _no_pictures()
        return preprocess(load_image(image), self.preprocessor)

    def prompt(self, request: Request) -> Prompt:
        """The request's token ids and pictures, as the model will see them. Raises RequestError."""
        if not isinstance(request.images, list | tuple):  # an array or a string would be taken apart into pictures
            found, hint = type(request.images).__name__, "put a single picture in a list: images=[picture]"
            raise RequestError("is not a list of pictures", where="images", found=found, hint=hint)
        if not isinstance(request.sampling, SamplingParams):
            found = type(request.sampling).__name__
            raise RequestError("not sampling parameters", where="sampling", expected="SamplingParams(...)", found=found)
        if not isinstance(request.prompt, str | list | tuple):
            expected, found = "text, or a list of messages", type(request.prompt).__name__
            raise RequestError("cannot be answered", where="prompt", expected=expected, found=found)
        if request.raw or self._template is None:
            return self._raw_prompt(request)
        if isinstance(request.prompt, str):
            if not request.prompt.strip() and not request.images:
                raise RequestError("is empty", where="prompt", hint="ask something, or give a picture")
            parts: list[dict[str, Any]] = [{"type": "image"} for _ in request.images]
            messages = messages_from([{"role": "user", "content": [*parts, {"type": "text", "text": request.prompt}]}])
        else:
            messages = messages_from(list(request.prompt))
        if request.system is not None:
            system = checked_text(request.system, "system")
            messages = (*messages_from([{"role": "system", "content": system}]), *messages)
        return prompt_from_messages(
            messages,
            template=self._template,
            tokenizer=self.tokenizer,
            images=request.images,
            tools=None if request.tools is None else tools_from(request.tools),
            variables=None if request.date_string is None else {"date_string": request.date_string},
        )

    def _raw_prompt(self, request: Request) -> Prompt:
        if not isinstance(request.prompt, str):
            why = "raw" if request.raw else "the bundle has no chat template, as base models have none"
            raise RequestError("is a conversation", where="prompt", expected=f"text, because {why}")
        for name, value in (("system", request.system), ("tools", request.tools)):
            if value is not None:
                raise RequestError("needs a chat template", where=name, hint="write it into the prompt")
        return prompt_from_text(request.prompt, request.images, tokenizer=self.tokenizer)

    def _stream(self, requests: Sequence[Request]) -> Stream:
        self._require_open()
        return Stream(self, requests)

    def _require_open(self) -> None:
        if not self._is_open:
            raise UsageError("the engine is not open", hint="use it as `with Engine.load(...) as engine:`")

    def _encode(self, image: object, clock: _Clock) -> EncodedImage:
        if isinstance(image, EncodedImage):
            if image.engine is not self:
                raise RequestError("was encoded by another engine", where="images", hint="encode it with this one")
            return image
        self._require_open()
        start = time.perf_counter()
        tiles = self.tiles(image)  # type: ignore[arg-type]
        encoding = time.perf_counter()
        features = self._backend.encode(tiles)
        clock.preprocess_seconds += encoding - start
        clock.vision_seconds += time.perf_counter() - encoding
        return EncodedImage(features.key, features.num_tiles, features, self)

    def _loop_for(self, rows: Sequence[Row]) -> Loop:
        """One loop for all requests where the back end's slots are fixed; else one over slots made for these."""
        if self._loop is not None:
            return self._loop
        if limits := self._backend.limits:
            num_slots, cache_len, num_tiles = limits.max_batch, limits.max_seq_len, limits.max_tiles
        else:
            num_slots, cache_len = len(rows), max(row.cache_len for row in rows)
            num_tiles = max(row.visibility.shape[1] for row in rows)
        sizes = {"num_slots": num_slots, "cache_len": cache_len, "num_tiles": num_tiles}
        if self._speculate:
            tokens: TokenSlots = HostTokens(self._backend.slots(**sizes), num_slots, cache_len)
        else:
            tokens = self._backend.tokens(**sizes)
        loop = Loop(tokens, num_slots, self.bundle.manifest.mask_semantics, speculate=self._speculate)
        if limits:
            self._loop = loop
        return loop

    def _check_pictures(self, prompt: Prompt) -> None:
        if prompt.images and self.model.is_text_only:
            raise _no_pictures()
        limits, num_tiles = self._backend.limits, self.model.vision.max_num_tiles
        if limits and len(prompt.images) * num_tiles > limits.max_tiles:
            expected = f"at most {limits.max_tiles // num_tiles}, which the engine was built for"
            hint = "build it with a larger --max-tiles"
            raise RequestError(
                "too many pictures", where="images", expected=expected, found=len(prompt.images), hint=hint
            )

    def _room(self, prompt: Prompt) -> int:
        """Tokens that the context has room for after the prompt."""
        limits, num_tokens = self._backend.limits, len(prompt.token_ids)
        limit = min(self.model.text.max_seq_len, limits.max_seq_len if limits else self.model.text.max_seq_len)
        if num_tokens >= limit:
            raise RequestError(
                "the prompt is too long",
                where="prompt",
                expected=f"at most {limit - 1} tokens, so that one more fits the context of {limit}",
                found=f"{num_tokens} tokens",
                hint="shorten it",
            )
        return limit - num_tokens

    def _row(self, index: int, request: Request, prompt: Prompt, images: Sequence[EncodedImage]) -> Row:
        sampling, vocab_size = request.sampling, self.model.text.vocab_size
        num_tiles = [image.num_tiles for image in images]
        return Row(
            index=index,
            token_ids=np.array(prompt.token_ids, np.int64),
            visibility=image_visibility(prompt.token_ids, self.model.image_token_id, num_tiles),
            features=[image.features for image in images],
            sampler=Sampler(sampling, vocab_size, prompt.token_ids, self._generation.eos_token_ids, row=index),
            text=TextStream(self.tokenizer.backend, sampling.stop),
            max_new_tokens=min(sampling.max_new_tokens, self._room(prompt)),
        )


@dataclass(slots=True)
class _Clock:
    preprocess_seconds: float = 0.0
    vision_seconds: float = 0.0


class Stream:
    """An iterator of `TokenEvent`s that can be closed early; closing stops the work.

    `generation()` is the answer so far, and the whole answer once the iterator is exhausted.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._engine, self._requests = engine, requests
        self._prompts = [engine.prompt(request) for request in requests]
        for prompt in self._prompts:
            engine._check_pictures(prompt)  # both before any picture is encoded
            engine._room(prompt)
        self._clocks = [_Clock() for _ in requests]
        images = [
            [engine._encode(image, clock) for image in prompt.images]
            for prompt, clock in zip(self._prompts, self._clocks, strict=True)
        ]
        self._rows = [
            engine._row(index, request, prompt, encoded)
            for index, (request, prompt, encoded) in enumerate(zip(requests, self._prompts, images, strict=True))
        ]
        self._logprobs: list[list[tuple[float, tuple[tuple[int, float], ...]]]] = [[] for _ in requests]
        self._loop = engine._loop_for(self._rows)
        self._events = answer(self._loop, self._rows)

    def __iter__(self) -> Iterator[TokenEvent]:
        return self

    def __next__(self) -> TokenEvent:
        self._engine._require_open()
        try:
            event = next(self._events)
        except MllamaError:
            self.close()
            raise
        if event.logprob is not None:
            self._logprobs[event.row].append((event.logprob, event.top_logprobs))
        return event

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop generating and free the caches; a second time does nothing."""
        for row in self._rows:
            self._loop.cancel(row)
        self._events = iter(())

    def __del__(self) -> None:
        if hasattr(self, "_loop"):  # a stream that was dropped must not keep its slots
            self.close()

    def generation(self) -> Generation:
        """The first row's answer so far."""
        return self.generations()[0]

    def generations(self) -> list[Generation]:
        """Every row's answer so far."""
        return [self._generation(index) for index in range(len(self._rows))]

    def _generation(self, index: int) -> Generation:
        row, clock = self._rows[index], self._clocks[index]
        num_steps = max(1, len(row.generated) - 1)
        patches = self._engine.model.vision.num_patches
        return Generation(
            text=row.text.text,
            token_ids=tuple(row.generated),
            finish_reason=row.finish_reason or "cancelled",
            usage=Usage(len(row.token_ids), row.visibility.shape[1] * patches, len(row.generated)),
            timings=Timings(
                preprocess_ms=clock.preprocess_seconds * 1e3,
                vision_ms=clock.vision_seconds * 1e3,
                prefill_ms=row.prefill_seconds * 1e3,
                decode_ms_per_token=row.decode_seconds / num_steps * 1e3,
            ),
            logprobs=None if self._requests[index].sampling.logprobs is None else tuple(self._logprobs[index]),
            notices=self._prompts[index].notices,
        )


def _no_pictures() -> RequestError:
    hint = "ask without pictures, or export the checkpoint without --text-only"
    return RequestError("the model is text-only, and sees no pictures", where="images", hint=hint)


def _preprocessor(bundle: Bundle) -> PreprocessorConfig:
    return PreprocessorConfig.from_dict(_json(bundle, "preprocessor.json"), bundle.path("preprocessor.json"))


def _template(bundle: Bundle, tokenizer: Tokenizer, generation: GenerationConfig) -> ChatTemplate | None:
    name = "chat_template.jinja"
    if name not in bundle.manifest.files:
        return None
    return ChatTemplate.from_file(
        bundle.path(name), special_tokens=tokenizer.special_tokens, token_variables=generation.token_variables
    )


def _json(bundle: Bundle, name: str) -> Any:
    return load_json(bundle.path(name).read_bytes(), where=bundle.path(name), error=BundleError)
