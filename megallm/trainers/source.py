"""Where a model comes from: a preset's name, a Hugging Face directory, or a checkpoint of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megallm.checkpoint import sharded
from megallm.checkpoint.adapters import open_weights
from megallm.checkpoint.huggingface import HFWeights, load_into
from megallm.config.huggingface import model_config_from_hf, read_hf_config
from megallm.config.model import ModelConfig
from megallm.config.presets import get_preset
from megallm.data.tokenizer import Tokenizer
from megallm.optim.flat import refill
from megallm.trainers.engine import Engine

Head = Literal["lm", "scalar"]


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model's shape, and its weights and tokenizer where it has them."""

    config: ModelConfig
    kind: Literal["preset", "huggingface", "checkpoint"]
    path: Path | None = None
    """Directory of the weights; None = new weights."""
    new_head: bool = False
    """Whether the head is not the stored one, and keeps its initial weights."""
    tokenizer_path: Path | None = None

    @property
    def directory(self) -> Path | None:
        """Where its tokenizer and chat template are; None for a preset."""
        return None if self.tokenizer_path is None else _folder(self.tokenizer_path)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer beside the weights, if there is one."""
        return None if self.tokenizer_path is None else Tokenizer.from_path(self.tokenizer_path)

    def check_weights(self) -> None:
        """ValueError for files that are damaged, as far as their headers tell. For the time before ranks talk."""
        if self.kind == "checkpoint" and self.path is not None:
            open_weights(self.path, keep_adapters=True)

    def load_weights(self, engine: Engine) -> None:
        """Fills the engine's model from the directory; leaves the initial weights where there is none.

        Adapters of a checkpoint are added to its weights: the engine's own are new, and off they leave this model.
        """
        if self.path is None:
            return
        if self.kind == "checkpoint":
            engine.load(str(self.path), weights_only=True, new_head=self.new_head, merge_adapters=True)
        else:
            groups = refill(engine.model, engine.flat)
            load_into(engine.model, self.path, new_head=self.new_head, groups=groups)
            if engine.optimizer is not None:
                engine.optimizer.refresh_master()


def open_model(name: str, *, from_scratch: bool = False, head: Head | None = None) -> ModelSource:
    """The source that `--model name` means. Reads headers only.

    head: what the model is to have; a new one where another is stored. None = the stored one.
    ValueError or FileNotFoundError for an unknown preset, a missing directory, an unsupported architecture, or a
    directory without weights.
    """
    path = Path(name)
    if not path.is_dir():
        if "/" in name or path.exists():
            raise FileNotFoundError(f"{name}: no such model directory; give one, or the name of a preset")
        return ModelSource(config=with_head(get_preset(name), head), kind="preset")
    checkpoint = sharded.latest(path)
    if checkpoint is not None:
        found = [p / "tokenizer.json" for p in (checkpoint, checkpoint.parent) if (p / "tokenizer.json").is_file()]
        stored = sharded.read_model_config(checkpoint)
        config = with_head(stored, head)
        return ModelSource(
            config=config,
            kind="checkpoint",
            path=None if from_scratch else checkpoint,
            new_head=config.head != stored.head,
            tokenizer_path=found[0] if found else None,
        )
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ValueError(
            f"{name} holds adapters in peft's format and no model: give their base model, and load them beside it with "
            "engine.load_adapters (docs/lora.md)"
        )
    stored = model_config_from_hf(read_hf_config(path))
    config = with_head(stored, head)
    if not from_scratch:
        HFWeights(path, config, new_head=config.head != stored.head)  # names and shapes, from the files' headers
    has_tokenizer = (path / "tokenizer.json").is_file()
    return ModelSource(
        config=config,
        kind="huggingface",
        path=None if from_scratch else path,
        new_head=config.head != stored.head,
        tokenizer_path=path if has_tokenizer else None,
    )


def with_head(config: ModelConfig, head: Head | None) -> ModelConfig:
    """The shape with that head; None: as it is. ValueError for a language model's head where another is stored."""
    if head is None or head == config.head:
        return config
    if head == "lm":
        raise ValueError("this is a reward model, with a scalar head: give a language model")
    return config.replace(head=head, tie_word_embeddings=False)


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
