"""The form that a run begins with: typical values, a hint for each, and the engine's own checks as its errors."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from django import forms
from django.utils.text import format_lazy
from django.utils.translation import gettext_lazy as _

from fewshot_engine.config import READY_BACKBONES, EpisodeConfig, TrainConfig
from fewshot_engine.errors import ConfigError
from webapp.training.models import ACCURATE, DEFAULT_ENCODER, FAST

TYPICAL_RATE = {"adapt": 1e-4, "full": 1e-3}
TYPICAL = TrainConfig(kind="full")  # the specification's values; the rate alone depends on the kind
KINDS = (("adapt", _("Adapt")), ("full", _("Full")))
BACKBONE_NAMES = {
    ACCURATE: _("the accurate encoder"),
    "conv4": _("Conv-4, small, from scratch"),
    "resnet12": _("ResNet-12, from scratch"),
    "efficientnet-lite0": _("EfficientNet-Lite0, pretrained"),
    "efficientnet-lite1": _("EfficientNet-Lite1, pretrained"),
    "efficientnet-lite2": _("EfficientNet-Lite2, pretrained"),
}

# How a ConfigError begins -> the field it speaks of.
FIELD_OF = {
    "kind": "kind",
    "backbone": "backbone",
    "way": "way",
    "shot": "shot",
    "query": "query",
    "epochs": "epochs",
    "episodes an epoch": "episodes_per_epoch",
    "episodes a step": "episodes_per_step",
    "image size": "image_size",
    "learning rate": "learning_rate",
    "evaluation every": "eval_every",
}


def _number(label: Any, hint: Any, initial: int, low: int, high: int, unit: Any = "") -> forms.IntegerField:
    attrs = {"min": low, "max": high, "inputmode": "numeric"}
    field = forms.IntegerField(
        label=label,
        help_text=hint,
        initial=initial,
        widget=forms.NumberInput(attrs=attrs),
        error_messages={"invalid": format_lazy(_("Give a whole number, such as {n}."), n=initial)},
    )
    field.unit = unit  # type: ignore[attr-defined]  # for the template, which draws it into the box
    return field


class RunForm(forms.Form):
    """`config` is there once the form is valid."""

    EPISODE = ("way", "shot", "query")
    COURSE = ("epochs", "episodes_per_epoch", "episodes_per_step", "learning_rate", "eval_every")
    PIXELS = ("backbone", "image_size")

    name = forms.CharField(label=_("Name"), max_length=120, required=False)
    kind = forms.ChoiceField(label=_("What is learned"), choices=KINDS, initial="adapt", widget=forms.RadioSelect)
    way = _number(
        _("Ways (N)"),
        _("Classes in an episode. 5 is usual; take about as many as your label sets have labels."),
        TYPICAL.episode.way,
        2,
        100,
        _("classes"),
    )
    shot = _number(
        _("Shots (K)"),
        _("Support examples a class. 1 is hardest and carries over best, 5 is balanced, 10 is steadier."),
        TYPICAL.episode.shot,
        1,
        100,
        _("examples"),
    )
    query = _number(
        _("Query images (Q)"),
        _("To be classified, a class. 5 to 15 are usual; more give a steadier direction and take longer."),
        TYPICAL.episode.query,
        1,
        100,
        _("images"),
    )
    epochs = _number(
        _("Epochs"),
        _("1 to 5 are usual: learning by episodes settles quickly. More for unusual subjects."),
        TYPICAL.epochs,
        1,
        1000,
    )
    episodes_per_epoch = _number(
        _("Episodes an epoch"),
        _("A few hundred are enough to adapt; full training of a large collection takes thousands."),
        TYPICAL.episodes_per_epoch,
        1,
        100_000,
    )
    episodes_per_step = _number(
        _("Episodes a step"),
        _("How many are averaged before the weights move. More is steadier, and needs more memory."),
        TYPICAL.episodes_per_step,
        1,
        64,
    )
    learning_rate = forms.FloatField(
        label=_("Learning rate"),
        help_text=_("0.0001 to refine what is there, 0.001 to train, up to 0.01 from scratch. Less if the loss jumps."),
        required=False,
        widget=forms.NumberInput(
            attrs={"min": 0, "max": 1, "step": "any", "inputmode": "decimal", "placeholder": _("the usual one")}
        ),
        error_messages={"invalid": _("Give a number, such as 0.001.")},
    )
    eval_every = _number(
        _("Evaluate every"),
        _("1 measures after every epoch, on 600 episodes of classes that are never trained on."),
        TYPICAL.eval_every,
        1,
        1000,
        _("epochs"),
    )
    base = forms.ChoiceField(
        label=_("Adapted from"),
        help_text=_("Accurate tells alike things apart better; with fast, new photos are taken in sooner."),
        required=False,
        choices=((ACCURATE, _("The accurate encoder")), (FAST, _("The fast encoder"))),
        initial=DEFAULT_ENCODER,
    )
    backbone = forms.ChoiceField(
        label=_("Backbone"),
        help_text=_("The network that turns a photo into numbers."),
        required=False,
        choices=[(name, BACKBONE_NAMES.get(name, name)) for name in READY_BACKBONES],
        initial=TYPICAL.backbone,
    )
    image_size = _number(
        _("Image size"),
        _("84 is usual for episodes. Time and memory grow with its square."),
        TYPICAL.image_size,
        28,
        384,
        _("pixels"),
    )
    key = forms.CharField(widget=forms.HiddenInput, required=False, max_length=64)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields["key"].initial = f"train-{uuid4()}"
        self.fields["image_size"].required = False
        self.config: TrainConfig | None = None

    def episode_fields(self) -> list[forms.BoundField]:
        return [self[name] for name in self.EPISODE]

    def course_fields(self) -> list[forms.BoundField]:
        return [self[name] for name in self.COURSE]

    def pixel_fields(self) -> list[forms.BoundField]:
        return [self[name] for name in self.PIXELS]

    def clean_key(self) -> str:
        key: str = self.cleaned_data["key"]
        return key if key.startswith("train-") else f"train-{uuid4()}"

    def clean(self) -> dict[str, Any]:
        values = {name: value for name, value in self.cleaned_data.items() if value not in (None, "")}
        if not self.errors or "kind" in values:
            self._check(values)
        return self.cleaned_data

    def _check(self, values: dict[str, Any]) -> None:
        """Ask the engine for its opinion; after each objection the typical value stands in, so that all are heard."""
        kind = values["kind"]
        episode = {name: values[name] for name in self.EPISODE if name in values}
        course = {name: values[name] for name in (*self.COURSE, *self.PIXELS) if name in values}
        course.setdefault("learning_rate", TYPICAL_RATE[kind])
        if kind == "adapt":  # reads the embeddings that there are already
            course["backbone"] = values.get("base", DEFAULT_ENCODER)
            course.pop("image_size", None)
        if self.errors:
            course.setdefault("eval_every", 1)
        for _attempt in range(len(FIELD_OF)):
            try:
                config = TrainConfig(kind=kind, episode=EpisodeConfig(**episode), **course)
            except ConfigError as error:
                name = _field_of(str(error))
                self.add_error(name, _sentence(str(error)))
                if name not in episode and name not in course:
                    return
                episode.pop(name, None)
                course.pop(name, None)
            else:
                self.config = None if self.errors else config
                return


def _field_of(message: str) -> str | None:
    """The field that an objection of the engine is about; the longest beginning wins."""
    for start in sorted(FIELD_OF, key=len, reverse=True):
        if message.startswith(start):
            return FIELD_OF[start]
    return None


def _sentence(message: str) -> str:
    return f"{message[:1].upper()}{message[1:]}."
