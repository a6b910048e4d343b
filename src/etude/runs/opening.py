"""Open what a user names: a run folder, a PEFT adapter folder, or a model."""

import dataclasses
import datetime
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etude import files
from etude.config.loading import Override, load_config
from etude.config.schema import Config
from etude.conversation.renderer import Renderer
from etude.errors import UserError
from etude.models import device, loading, lora
from etude.runs.folder import CONFIG, how_to_continue, is_finished, is_live, read_started
from etude.runs.manifest import read_manifest, recorded_date

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """What a program works on: a base, how to render for it, and the adapter's folder if it is a run."""

    base: loading.Base
    renderer: Renderer
    config: Config
    adapter: Path | None

    def tuned(self) -> Any:
        """The model to answer with: with the adapter, merged (in place) where the base is in float32.

        Folded into 4- or 16-bit weights, the adapter would be rounded with them, and the model another
        one than was trained and proven: on the sample, tuned in bfloat16, the loss of 0.3239 becomes
        0.3193, or 0.3230 merged in float32 and rounded once. Unmerged costs a tenth of the time.
        """
        if self.adapter is None:
            return self.base.model
        tuned = self.with_adapter()
        return lora.merge(tuned) if lora.mergeable(tuned) else tuned

    def with_adapter(self) -> Any:
        """The base with the adapter beside it, so that it can be switched off."""
        assert self.adapter is not None
        return lora.load_adapter(self.base.model, self.adapter)


def open_config(name: str, overrides: Sequence[Override]) -> Config:
    """The configuration of a run, of an adapter made elsewhere, or the default one for a model's name.

    Raises:
        UserError: no such run, one without an adapter, or faults in its configuration.
    """
    folder = Path(name)
    if lora.is_adapter(folder):
        if (folder / CONFIG).is_file():
            return load_config(folder / CONFIG, overrides=overrides)
        # An adapter made elsewhere names its base only.
        named = lora.describe(folder).base_model_name_or_path
        if not named:
            raise UserError(f"{name}: adapter_config.json does not name the adapter's base")
        name = named
    elif is_live(folder) or read_started(folder) is not None:
        raise UserError(
            f"{name}: this run has no adapter yet. Wait until its training has ended; if it was "
            f"interrupted, {how_to_continue(folder)}"
        )
    elif name.startswith(("runs/", "./", "../", "/")) and not folder.exists():
        there = sorted(str(path.parent) for path in folder.parent.glob("*/adapter_config.json"))
        raise UserError(
            f"{name}: no such run; there are: {', '.join(there) or 'none yet (etude train makes one)'}"
        )
    return load_config(None, overrides=[f"model.name={name}", *overrides])


def open_target(name: str, overrides: Sequence[Override]) -> Target:
    """Open a run folder, a PEFT adapter folder or a model by name, with its base loaded.

    Raises:
        UserError: not there, or an adapter that was trained on another base or chat format.
    """
    config, folder = open_config(name, overrides), Path(name)
    base = _load(config)
    if not lora.is_adapter(folder):
        return Target(base, renderer_for(base, config, today()), config, None)
    lora.check_base(name, lora.describe(folder).revision, base.identity)
    if (folder / CONFIG).is_file():  # one of Etude's runs, which has the base's tokenizer
        renderer = renderer_for(base, config, recorded_date(folder))
    else:
        if tokenizer := loading.own_tokenizer(folder):
            log.info("%s: its own tokenizer in use, not the base's", folder)
            base = dataclasses.replace(base, tokenizer=tokenizer)
        renderer = renderer_for(base, config, today())
    if is_finished(folder):
        manifest = read_manifest(folder)
        lora.check_base(name, manifest["base"]["identity"], base.identity)
        renderer.check_state(manifest["chat_format"], name)
    return Target(base, renderer, config, folder)


def _load(config: Config) -> loading.Base:
    place = device.choose(config.model.dtype, config.training.use_cpu)
    # An int8 base is made for training; a 4-bit one where there is no room for another.
    quantization = "nf4" if config.model.quantization == "nf4" else None
    return loading.load_base(config.model.name, place, config.model.revision, quantization)


def today() -> datetime.date:
    """The day that a template which asks for it writes, where no run has fixed it."""
    return datetime.date.today()


def renderer_for(
    base: loading.Base | loading.Outline, config: Config, date: datetime.date | None = None
) -> Renderer:
    """The renderer of a base under a config; `date` is for templates that write one.

    Raises:
        UserError: a template file that cannot be read, or a template that cannot be used.
    """
    template, name = None, config.model.chat_template
    if name:
        try:
            template = files.read_text(Path(name))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"model.chat_template: {name}: cannot be read: {error}") from None
    # Raw text needs no template, so a bad one is an error of the first conversation.
    return Renderer(
        base.tokenizer, template, config.dataset.system_prompt, date, config.generation.thinking
    )
