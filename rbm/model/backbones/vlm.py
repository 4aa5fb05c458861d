"""What vision-language models of transformers share as backbones.

1. Frames that a batch shows are encoded once each, in groups of one size; or their features are given.
2. Words and pictures of all clips lie end to end in one pack (`rbm.model.packing`), without padding.
3. A hidden state is read at a token behind each step, or pooled over the step's pictures (older checkpoints), and at
   a token behind each clip or pair.

The five marker tokens have a small table of their own (`markers`), so that they can be trained while the large one is
frozen; the rows that the large table has for them are not read, and get the same numbers when a model is exported.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn

from rbm.errors import UserError
from rbm.model import packing
from rbm.model.backbones.base import Backbone, PairMode, Preprocessor, States, check_pairs, check_views, view_names
from rbm.model.batch import ClipBatch
from rbm.model.memory import Mark, Memory, Recall, Run
from rbm.model.packing import Pack, Packer, Picture, Place
from rbm.model.pixels import AsIs, PillowResize, PillowSquare, tensor_resize
from rbm.model.prompt import ISOLATED, MARKERS, Prompt
from rbm.model.tokens import TOKENIZER, Words
from rbm.model.weights import State, fill, read_folder, read_json, read_text

log = logging.getLogger(__name__)

_EMPTY: ContextVar[bool] = ContextVar("_EMPTY", default=False)
"""Models are being made that a file will fill."""

POOLINGS = ("token", "mean", "last", "attention")

VIEW_PICTURE = "Picture {k} ({view}): "
"""What the default prompt writes before a picture where steps show named views."""

ENCODE_TOKENS = 65536
"""Visual tokens that the tower gets at once while nothing is trained in it."""

ENCODE_TOKENS_CPU = 1024
"""The same on the CPU, where what a few frames take stays in the cache: a third less time."""


class VisionLanguageBackbone(Backbone):
    """A vision-language model.

    Args:
        architecture: transformers' configuration of it, as a dict (what its config.json holds).
        tokenizer: content of its tokenizer.json.
        prompt: the words around the frames, or the name of known ones (`rbm.model.prompt.PROMPTS`).
        pooling: where a frame is read: `token` (the one behind the step), or over the tokens of its pictures: `mean`,
            `last`, `attention` (softmax of a learned score by `pool_temperature`).
        resize: `pillow` (in the loader, published weights' own) or `device` (bicubic on tensors; see `tensor_resize`).
        views: names of the views that a step shows, where they are several; empty: one view, whichever comes first.
        view_tags: how views are told apart: `text` (the prompt's `{view}`; the default prompt gets one) or `embedding`
            (a learned vector).
        base: id on the hub of the plain model that it stands on, where it has one; kept for those who ask.

    Raises:
        ValueError: an option that does not exist, or a prompt that does not name the views. UserError: a
            tokenizer that does not fit.
    """

    default_prompt: ClassVar[Prompt] = ISOLATED
    grid_positions: ClassVar[bool] = True
    freezes_tower: ClassVar[bool] = True
    unit: int
    """Pixels of a visual token's side."""

    def __init__(
        self,
        architecture: Mapping[str, Any],
        tokenizer: str,
        prompt: Prompt | Mapping[str, Any] | str | None = None,
        pooling: str = "token",
        pool_temperature: float = 1.0,
        resize: str = "pillow",
        views: Sequence[str] = (),
        view_tags: str = "text",
        base: str | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("pooling", pooling, POOLINGS),
            ("resize", resize, ("pillow", "device")),
            ("view_tags", view_tags, ("text", "embedding")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        packing.register()
        self.views, self.view_tags = view_names(views), view_tags
        self.prompt = self._tagged(Prompt.of(prompt if prompt is not None else self.default_prompt))
        if (pooling == "token") != bool(self.prompt.frame):
            raise ValueError("pooling='token' needs a prompt with a token after each step, the others one without")
        self.words = Words(tokenizer, self.prompt.signs())
        self.base = base
        self.pooling, self.pool_temperature, self.resize = pooling, pool_temperature, resize
        self.model: Any = self._build(dict(architecture))
        self.hidden = int(self.language.config.hidden_size)
        self.markers = nn.Embedding(len(MARKERS), self.hidden)
        self.frame_pool_attn = nn.Linear(self.hidden, 1, bias=False)
        if pooling != "attention":
            self.frame_pool_attn.requires_grad_(False)
        if view_tags == "embedding":
            self.view_embedding = nn.Embedding(max(1, len(self.views)), self.hidden)
        if self.words.rows > self.embedding.num_embeddings:
            raise UserError(
                f"the tokenizer has {self.words.rows} words and the embedding table {self.embedding.num_embeddings} "
                "rows: they belong to different models"
            )
        if not _EMPTY.get():
            self.start()

    # what a family of models says of itself

    @abstractmethod
    def _build(self, architecture: dict[str, Any]) -> Any:
        """The model of transformers with random weights; its language part attends by `PACKED`."""

    @property
    @abstractmethod
    def language(self) -> Any:
        """The language model."""

    @abstractmethod
    def _encode(self, frames: Tensor) -> Tensor:
        """uint8 (U, h, w, 3) of fitting size -> (U, levels, rows, columns, d)."""

    def _read(self, x: Tensor, pack: Pack, features: Tensor) -> Tensor:
        """Hidden states of a pack: x (L, d) -> (L, d); features (M, levels, d) of its pictures."""
        found = self.language(
            inputs_embeds=x[None], position_ids=pack.position[:, None], use_cache=False, streams=pack.streams
        )
        hidden: Tensor = found.last_hidden_state[0]
        return hidden

    def grid(self, group: Tensor) -> tuple[int, int]:
        """Rows and columns of the visual tokens of one frame of a group."""
        if group.is_floating_point():
            return group.shape[2], group.shape[3]
        height, width = group.shape[1:3]
        if self.resize == "device":
            height, width = self._resize.size(height, width)
        if (height, width) != self._resize.size(height, width):
            raise ValueError(f"frames of {height}×{width} pixels have not gone through the backbone's preprocessor")
        return height // self.unit, width // self.unit

    # the rest is shared

    def places(self, height: int, width: int) -> int:
        height, width = self._resize.size(height, width)
        return (height // self.unit) * (width // self.unit)

    def check_task(self, task: str) -> None:
        self.words.check(task)

    def _tagged(self, prompt: Prompt) -> Prompt:
        """The prompt, which must name the views where text tells them apart; the default one is made to.

        Raises:
            ValueError: another prompt that does not, or names views that the model does not have.
        """
        named = "{view}" in prompt.picture
        if self.views and self.view_tags == "text" and not named:
            if prompt != self.default_prompt:
                raise ValueError(
                    f"the prompt's picture {prompt.picture!r} does not tell the views apart: write {{view}} into it, "
                    "such as 'Picture {k} ({view}): ', or set view_tags='embedding'"
                )
            return replace(prompt, picture=VIEW_PICTURE)
        if named and not self.views:
            raise ValueError(f"the prompt's picture {prompt.picture!r} names views: say which in views")
        return prompt

    def config(self) -> dict[str, Any]:
        return {
            "architecture": self.architecture,
            "prompt": vars(self.prompt) | {},
            "pooling": self.pooling,
            "pool_temperature": self.pool_temperature,
            "resize": self.resize,
            "views": list(self.views),
            "view_tags": self.view_tags,
            "base": self.base,
        }

    @property
    def architecture(self) -> dict[str, Any]:
        """transformers' configuration, JSON-able, with the vocabulary of the embedding table as it is."""
        return plain_architecture(self.model.config)

    def files(self) -> dict[str, str]:
        return {TOKENIZER: self.words.to_str()}

    @classmethod
    def from_config(cls, config: dict[str, Any], files: Mapping[str, str]) -> Backbone:
        if TOKENIZER not in files:
            raise UserError(f"{TOKENIZER} is missing beside the weights")
        return cls(tokenizer=files[TOKENIZER], **config)

    @property
    def embedding(self) -> nn.Embedding:
        found: nn.Embedding = self.language.get_input_embeddings()
        return found

    @classmethod
    def from_base(cls, base: str, **options: Any) -> Self:
        """Start from a plain vision-language model, in the precision in which its weights are stored.

        Args:
            base: a folder, or an id on the Hugging Face hub.
            options: arguments of the constructor, but architecture and tokenizer.

        Raises:
            UserError: the base cannot be had, or is another kind of model.
        """
        backbone = cls.read_base(base, **options)
        backbone.start()
        return backbone

    @classmethod
    def read_base(cls, base: str, **options: Any) -> Self:
        """`from_base` without numbers for what a plain model does not have."""
        folder = found_base(base)
        config = read_json(folder / "config.json")
        if config.get("model_type") != cls.name:
            raise UserError(
                f"{base} is a model of type {config.get('model_type')!r}, {cls.__name__} needs {cls.name!r}"
            )
        if not (folder / TOKENIZER).is_file():
            raise UserError(f"{base} has no {TOKENIZER}")
        with without_random_weights():
            hub = None if Path(base).is_dir() else base
            backbone = cls(config, read_text(folder / TOKENIZER), base=hub, **options)
        fill(backbone.model, backbone.base_keys(read_folder(folder)), base)
        return backbone

    def base_keys(self, state: State) -> State:
        """Tensors of a published base model under the names of `self.model`."""
        expected = self.model.state_dict().keys()
        table = next(name for name, x in self.model.named_parameters() if x is self.embedding.weight)
        found = {name.removeprefix("model."): x for name, x in state.items()}
        head = found.pop("lm_head.weight", None)
        if head is not None and table in expected:
            found.setdefault(table, head)
        return found

    def start(self) -> None:
        """Numbers to begin with for what a plain vision-language model does not have.

        A marker that the tokenizer had already has its row of the table; a new one starts near the mean of all rows.
        """
        with torch.no_grad():
            table = self.embedding.weight
            rows = table.float().mean(0) + table.float().std() * torch.randn(len(MARKERS), self.hidden).to(table.device)
            for row, (token, place) in enumerate(zip(MARKERS, self.words.markers, strict=True)):
                if token not in self.words.added and place < len(table):
                    rows[row] = table[place]
            new = [token for token in MARKERS if token in self.words.added]
            if new:
                log.warning("tokenizer and embedding get %d tokens more: %s", len(new), " ".join(new))
            self.markers.weight.copy_(rows)
            nn.init.normal_(self.frame_pool_attn.weight, std=self.hidden**-0.5)
            if self.view_tags == "embedding":
                nn.init.zeros_(self.view_embedding.weight)

    @property
    def _resize(self) -> PillowResize | PillowSquare:
        return PillowResize(self.unit)

    @property
    def preprocessor(self) -> Preprocessor:
        return self._resize if self.resize == "pillow" else AsIs()

    def encode(self, frames: Tensor) -> Tensor:
        if self.resize == "device":
            frames = tensor_resize(frames, self._resize.size(*frames.shape[1:3]))
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.tower.parameters()):
            return self._encode(frames)
        with torch.no_grad():
            tokens = (frames.shape[1] // self.unit) * (frames.shape[2] // self.unit)
            most = ENCODE_TOKENS_CPU if frames.device.type == "cpu" else ENCODE_TOKENS
            return torch.cat([self._encode(part) for part in frames.split(max(1, most // tokens))])

    def forward(self, batch: ClipBatch, mode: PairMode, pairs: Tensor | None = None) -> States:
        pack = self.pack(batch, mode, pairs)
        hidden, frames = self._hidden(batch, pack)
        readouts = None if mode is PairMode.CLIPS else hidden.index_select(0, pack.readouts.to(hidden.device))
        return States(frames, readouts)

    def advance(self, batch: ClipBatch, behind: Sequence[tuple[Memory, int]]) -> Tensor:
        return self._hidden(batch, self._pack_behind(batch, behind))[1]

    def _hidden(self, batch: ClipBatch, pack: Pack) -> tuple[Tensor, Tensor]:
        """Hidden states of the pack (L, d), and of the batch's steps (F, d)."""
        device = self.markers.weight.device
        marked, which = self._marked(pack.ids)
        pack, marked, which = pack.to(device), marked.to(device), which.to(device)
        features = torch.cat([group.flatten(2, 3).transpose(1, 2).flatten(0, 1) for group in self.encoded(batch)])
        seen = features.index_select(0, pack.content)  # (M, levels, d)
        x = self._embed(pack, marked, which)
        seen = seen.to(x.dtype)
        if self.view_tags == "embedding":
            seen = seen + self.view_embedding(pack.view).to(x.dtype)[:, None]
        x = x.index_copy(0, pack.picture, seen[:, 0])
        hidden = self._read(x, pack, seen)
        if self.pooling == "token":
            frames = hidden.index_select(0, pack.frames)
        else:
            frames = self._pooled(hidden.index_select(0, pack.picture), pack.owner, len(batch.frame_ids))
        return hidden, frames

    def _embed(self, pack: Pack, marked: Tensor, which: Tensor) -> Tensor:
        ids = pack.ids.clamp(max=self.embedding.num_embeddings - 1)
        x: Tensor = self.embedding(ids)
        return x.index_copy(0, marked, self.markers.weight.index_select(0, which).to(x.dtype))

    def _marked(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Places of a pack at which markers stand, and which: two int64 (m,), found before anything is on a device."""
        markers = torch.tensor(self.words.markers)
        marked = torch.isin(ids, markers).nonzero().flatten()
        return marked, (ids[marked][:, None] == markers).int().argmax(1)

    def _pooled(self, hidden: Tensor, owner: Tensor, steps: int) -> Tensor:
        """Hidden states of pictures (M, d), step `owner` (M,) of each -> (steps, d)."""
        if self.pooling == "last":
            last = torch.zeros(steps, dtype=torch.int64, device=owner.device)
            last = last.scatter_reduce(0, owner, torch.arange(len(owner), device=owner.device), "amax")
            return hidden.index_select(0, last)
        if self.pooling == "mean":
            weight = torch.ones(len(owner), device=hidden.device)
        else:
            score = self.frame_pool_attn(hidden).squeeze(-1).float() / self.pool_temperature
            top = torch.full((steps,), -torch.inf, device=hidden.device).scatter_reduce(
                0, owner, score.detach(), "amax"
            )
            weight = (score - top[owner]).exp()
        total = torch.zeros(steps, device=hidden.device).index_add(0, owner, weight)
        weight = (weight / total[owner]).to(hidden.dtype)
        return torch.zeros(steps, hidden.shape[1], dtype=hidden.dtype, device=hidden.device).index_add(
            0, owner, hidden * weight[:, None]
        )

    def pack(self, batch: ClipBatch, mode: PairMode, pairs: Tensor | None = None) -> Pack:
        """The batch as one sequence, on the CPU.

        Raises:
            UserError: an instruction with a special token in it, or a sequence longer than the model reads.
        """
        prompt = self.prompt
        for task in set(batch.tasks):
            self.check_task(task)
        check_views(batch, self.views)
        writer = _Writer(self, batch)
        used = check_pairs(mode, pairs, len(batch.tasks)) if mode in (PairMode.JOINT, PairMode.CAUSAL) else []
        if mode in (PairMode.CLIPS, PairMode.READOUT):
            tail = prompt.closing + prompt.readout if mode is PairMode.READOUT else ""
            roots: dict[str, tuple[int, ...]] = {}
            for clip, task in enumerate(batch.tasks):
                question, steps = prompt.question(task), writer.steps(clip)
                if prompt.shared:
                    if task not in roots:
                        roots[task] = (writer.branch(question),)
                    writer.branch(steps + tail + prompt.end, [clip], roots[task])
                else:
                    writer.branch(question + steps + tail + prompt.end, [clip])
        for a, b in used:
            task = batch.tasks[a]  # the instruction of a pair is its first clip's, as in the published layout
            if mode is PairMode.JOINT:
                root = writer.branch(prompt.question(task))
                first = writer.branch(writer.steps(a) + prompt.first_end, [a], (root,))
                second = writer.branch(writer.steps(b) + prompt.second_end, [b], (root,))
                writer.branch(prompt.closing + prompt.readout + prompt.end, [], (root, first, second))
            else:
                text = prompt.question(task, pair=True) + prompt.first + writer.steps(a) + prompt.split
                text += prompt.second + writer.steps(b, 1 + writer.pictures(a)) + prompt.closing + prompt.readout
                writer.branch(text + prompt.end, [a, b])
        self._check_length(writer.packer)
        return writer.packer.pack()

    def _pack_behind(self, batch: ClipBatch, behind: Sequence[tuple[Memory, int]]) -> Pack:
        """Steps behind what memories hold: as in `pack`, word for word and position for position."""
        for task in set(batch.tasks):
            self.check_task(task)
        check_views(batch, self.views)
        if not self._steps_stand_alone:
            raise UserError("this model's prompt joins the words of neighbouring steps: it cannot score step by step")
        writer = _Writer(self, batch)
        packer, runs = writer.packer, []
        for clip, (memory, kept) in enumerate(behind):
            mark, task = memory.crop(kept), batch.tasks[clip]
            begin = start = packer.branches[-1][1] if packer.branches else 0
            for step, views in writer.shown(clip):
                text = writer.step(views, mark.pictures + 1)
                ids = self.words.encode(text)
                if mark.places == 0 and self.prompt.shared:
                    ids = np.concatenate([self.words.encode(self.prompt.question(task)), ids])
                elif mark.places == 0:
                    ids = self.words.encode(self.prompt.question(task) + text)
                start = packer.branches[-1][1] if packer.branches else 0
                packer.add(ids, writer.pictures_of(step, views), [step], offset=mark.position)
                size = packer.branches[-1][1] - start
                mark = Mark(mark.places + size, packer.next_position[-1], mark.pictures + len(views))
                memory.marks.append(mark)
            size = packer.branches[-1][1] - begin
            memory.reserve(mark.places, packer.branches[-1][1] - start)
            runs.append(Run(memory, mark.places - size, size))
        self._check_length(packer)
        return packer.pack(Recall(runs))

    @cached_property
    def _steps_stand_alone(self) -> bool:
        """Whether the words of a step become the same tokens by themselves as between others."""
        names = ((self.views or ("",))[0],)
        first, second = self.prompt.steps(1, (names,)), self.prompt.steps(1, (names,), 2)
        apart = np.concatenate([self.words.encode(first), self.words.encode(second)])
        return np.array_equal(self.words.encode(first + second), apart)

    def _check_length(self, packer: Packer) -> None:
        longest, most = max(packer.next_position), self.language.config.max_position_embeddings
        if longest > most:
            raise UserError(
                f"a clip with its instruction takes {longest} places and the model reads {most}: shorten the "
                "instruction, or show fewer or smaller frames"
            )

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Trade time for memory: hidden states of a block are computed again on the way back."""
        if on:
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            self.model.disable_input_require_grads()  # else all of a frozen tower goes into the way back
        else:
            self.model.activation_checkpointing_disable()


class _Writer:
    """Text of clips into a packer."""

    def __init__(self, backbone: VisionLanguageBackbone, batch: ClipBatch) -> None:
        self.backbone = backbone
        prompt, words = backbone.prompt, backbone.words
        frame = words.id_of(prompt.frame) if prompt.frame else None
        pad, readout = words.id_of(prompt.pad), words.id_of(prompt.readout)
        self.packer = Packer(pad, frame, readout, backbone.grid_positions)
        self.ids = batch.frame_ids.tolist()
        ends = torch.cumsum(batch.lengths, 0).tolist()
        self.spans = [range(end - length, end) for end, length in zip(ends, batch.lengths.tolist(), strict=True)]
        self.places: list[Place] = []
        start = 0
        for group in batch.frames:
            rows, columns = backbone.grid(group)
            self.places += [Place(rows, columns, start + i * rows * columns) for i in range(len(group))]
            start += len(group) * rows * columns

    def shown(self, clip: int) -> Iterator[tuple[int, list[int]]]:
        """The clip's steps, each with the views that it shows."""
        for step in self.spans[clip]:
            yield step, [view for view, frame in enumerate(self.ids[step]) if frame >= 0]

    def pictures(self, clip: int) -> int:
        return sum(len(views) for _, views in self.shown(clip))

    def steps(self, clip: int, start: int = 1) -> str:
        names = self.backbone.views or ("",)
        views = tuple(tuple(names[view] for view in views) for _, views in self.shown(clip))
        return self.backbone.prompt.steps(len(views), views, start)

    def step(self, views: Sequence[int], start: int) -> str:
        """Text of one step that shows these views, whose first picture is number `start`."""
        names = self.backbone.views or ("",)
        return self.backbone.prompt.steps(1, (tuple(names[view] for view in views),), start)

    def pictures_of(self, step: int, views: Sequence[int]) -> list[Picture]:
        return [Picture(self.places[self.ids[step][view]], view, step) for view in views]

    def branch(self, text: str, clips: Sequence[int] = (), before: tuple[int, ...] = ()) -> int:
        pictures = [
            picture for clip in clips for step, views in self.shown(clip) for picture in self.pictures_of(step, views)
        ]
        steps = [step for clip in clips for step in self.spans[clip]]
        return self.packer.add(self.backbone.words.encode(text), pictures, steps, before)


def found_base(base: str) -> Path:
    """The folder of a base model, fetched from the hub if it is not here.

    Raises:
        UserError: neither a folder nor an id, or it cannot be fetched.
    """
    if Path(base).is_dir():
        return Path(base)
    from rbm.model.hub import fetch, is_hub_id

    if not is_hub_id(base):
        raise UserError(f"base model {base!r} is neither a folder nor an id such as Qwen/Qwen3-VL-4B-Instruct")
    return fetch(base)


def plain_architecture(config: Any) -> dict[str, Any]:
    """transformers' configuration as JSON-able values, less what says nothing about the architecture."""
    found: dict[str, Any] = config.to_dict()
    for key in ("transformers_version", "architectures", "_name_or_path", "torch_dtype", "dtype"):
        found.pop(key, None)
        for part in ("text_config", "vision_config"):
            found.get(part, {}).pop(key, None)
    return found


@contextmanager
def without_random_weights() -> Iterator[None]:
    """Models made in here have memory but no numbers: they will be read from a file."""
    from transformers.initialization import no_init_weights

    token = _EMPTY.set(True)
    try:
        with no_init_weights():
            yield
    finally:
        _EMPTY.reset(token)
