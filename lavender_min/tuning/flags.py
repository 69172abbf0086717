"""The flags of train.py: name, default and help of each, once. The Trainer's own are in `arguments`.

`ModelFlags` are those that make a model and its losses; a finished run remembers them in its folder.
"""

import math
import re
from dataclasses import dataclass, fields

from lavender_min import cli, data
from lavender_min.align import AGGREGATIONS, ALIGNERS, NORMS, TRUST, layers
from lavender_min.cli import flag
from lavender_min.hosts import FAMILIES
from lavender_min.tuning import grammar
from lavender_min.tuning.schedules import LAMBDA_SCHEDULES
from lavender_min.tuning.sets import DataSet, read_sets

MODES = ("qlora", "lora", "full")
# What --train_only may name, beside a regular expression.
COMPONENTS = ("vision", "projector", "language")
MATCHES = ("exact", "root", "all")
ATTEND = ("predicting", "reading")
LATENTS = ("lifted", "reshape")
STARTS = ("pretrained", "noise")


@dataclass
class ModelFlags:
    vlm: str = flag(
        "",
        "hub id or folder of the host (default: what goes with the data); of these families: "
        + "; ".join(f"{name}: {row.about}" for name, row in FAMILIES.items()),
    )
    mode: str = flag("lora", "what of the host trains; --qlora, --lora and --full are short for it", MODES)
    lora_r: int = flag(8, "rank of the adapters")
    lora_alpha: int = flag(32, "their scale, times their rank")
    lora_dropout: float = flag(0.05, "their dropout")
    lora_targets: str = flag("cross", "cross, language, released, or a regular expression over the host's modules")
    train_only: str = flag(
        "",
        "with --full: what of the host trains, of vision, projector, language (several with commas), or a regular expression over "
        "its parameters (default: all of it)",
    )
    plain: bool = flag(
        False,
        "fine-tune without alignment: the baseline of the same command without --plain, whose other flags may stay",
    )
    aggregate: str = flag(
        "learn",
        "what is aligned: " + "; ".join(f"{name}: {row.about}" for name, row in AGGREGATIONS.items()),
        AGGREGATIONS,
    )
    align_layers: str = flag(
        "",
        "the layers that are aligned, of those that see the picture: all, first, mid, last, every-N or numbers such as 3,8,13 "
        "(default: all where they are cross-attention, every-5 in other hosts)",
    )
    parallel_rank: int = flag(64, "rank of the parallel projections; 0: full copies")
    parallel_start: str = flag("pretrained", "what they start from: the host's own projections, or N(0, 0.02)", STARTS)
    aligner: str = flag("sim", "depth of the Aligner; none: the mean over its channels is aligned", ALIGNERS)
    aligner_kernel: int = flag(3, "3 is the paper's conv, 1 its mlp", [3, 1])
    aligner_norm: str = flag("instance", "norm inside the Aligner", NORMS)
    lambda_att: float = flag(10.0, "weight of the alignment loss; 0 only measures it")
    lambda_schedule: str = flag(
        "constant",
        "how that weight changes in training: constant, the paper's, or to 0 at the end of the run, linear or cosine",
        LAMBDA_SCHEDULES,
    )
    match: str = flag(
        "exact",
        "align the words that the host predicts right; root: those too of which it predicts another form (dog for dogs, in "
        "English); or all",
        MATCHES,
    )
    words: str = flag("answer", "align words of the answer, or of question and answer", ["answer", "all"])
    pos: str = flag(
        "",
        f"align only words of these parts of speech, of {', '.join(grammar.PARTS)} (several with commas), which an English word "
        "has in its sentence (default: all words)",
    )
    attend: str = flag("predicting", "the rows that predict a word, or that read it", ATTEND)
    trust: str = flag(
        "none",
        "weigh each word's error by the contrast of its raw map: none; contrast; threshold:X, those of at least X alone",
    )
    latents: str = flag(
        "lifted",
        "how attention to a resampler's latents becomes a picture: through what each latent has read of it, or, as in the "
        "paper, by taking N latents for √N × √N cells",
        LATENTS,
    )

    def __post_init__(self) -> None:
        """Values may also come from a file of an earlier run, so that choices are looked at here too."""
        for field in fields(ModelFlags):
            choices, value = field.metadata.get("choices"), getattr(self, field.name)
            if choices and value not in choices:
                raise ValueError(f"--{field.name} must be one of {', '.join(map(str, choices))}; got {value!r}")
        cli.at_least(1, lora_r=self.lora_r, lora_alpha=self.lora_alpha)
        cli.at_least(0, parallel_rank=self.parallel_rank)
        cli.between(0, 1, lora_dropout=self.lora_dropout)
        cli.between(0, math.inf, lambda_att=self.lambda_att)
        if not re.fullmatch(TRUST, self.trust):
            raise ValueError(f"--trust is none, contrast or threshold:X, such as threshold:0.6; got {self.trust!r}")
        if self.align_layers:
            layers.check(self.align_layers)
        if self.pos and not set(self.pos.split(",")) <= grammar.PARTS.keys():
            raise ValueError(
                f"--pos must name some of {', '.join(grammar.PARTS)}, with commas between; got {self.pos!r}"
            )
        if self.train_only and self.mode != "full":
            raise ValueError(f"--train_only {self.train_only} goes with --full; adapters are placed by --lora_targets")
        for name in ("lora_targets", "train_only"):
            value = getattr(self, name)
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"--{name} {value} is no regular expression: {error}") from None


@dataclass
class Flags(ModelFlags):
    data: list[str] = flag(
        ["flickr30k"],
        f"the examples: {', '.join(data.SOURCES)} (default: flickr30k). Several are mixed: flickr30k:0.7 ocrvqa30k:0.3 draws "
        "seven tenths of an epoch from the first, repeating or leaving out examples; an epoch is as long as all together. Without "
        "weights every example is taken once. The flags below, down to --maps, then have a value for each, '' for its default",
    )
    data_root: list[str] | None = flag(None, "their folder or hub id (default: data/<data>)")
    split: list[str] | None = flag(None, "a part of them")
    captions: list[str] | None = flag(None, "first or all, as the maps were made")
    eval_split: list[str] | None = flag(
        None, "hold out a split of the data, and log its losses (see --eval_strategy); '' for none of a data set"
    )
    maps: list[str] | None = flag(None, "the store that extract.py made (default: maps/<data>)")
    limit: int | None = flag(None, "take only the first N examples of each data set")
    eval_share: float | None = flag(None, "in place of --eval_split: hold out this share of each data set's pictures")
    qlora: bool = flag(False, "4-bit host (NF4, double quantisation) with LoRA adapters")
    lora: bool = flag(False, "LoRA adapters; what is done when nothing else is asked")
    full: bool = flag(False, "train every weight of the host")
    pretrain_aligner_steps: float = flag(
        0,
        "steps that train only what --aggregate and --aligner add, before the host joins; below 1, a share of the run's steps",
    )
    cache_vision: bool = flag(False, "run the frozen vision tower once a picture, and keep its states on disk")
    picture_steps: int = flag(100, "with --report_to tensorboard: steps between pictures of word maps")
    plan: bool = flag(False, "only say where a GPU's memory would go, and load nothing")
    help_training: bool = flag(False, "print the help of the Trainer's flags and leave")

    def __post_init__(self) -> None:
        """Fills in what follows from other flags."""
        modes = [mode for mode in MODES if getattr(self, mode)]
        if len(modes) > 1:
            raise ValueError(f"--{modes[0]} and --{modes[1]} exclude each other")
        self.mode = modes[0] if modes else self.mode
        self.vlm = self.vlm or data.SOURCES[self.sets[0].name].vlm
        super().__post_init__()
        refuse_idle(self)
        if self.match == "root" or self.pos:
            grammar.require("--match root" if self.match == "root" else "--pos")
        cli.at_least(1, limit=self.limit, picture_steps=self.picture_steps)
        self.pretrain_aligner_steps = steps_or_share(self.pretrain_aligner_steps)
        if self.plain and self.pretrain_aligner_steps:
            raise ValueError(
                f"--pretrain_aligner_steps {self.pretrain_aligner_steps} trains the Aligner, and --plain has none: leave out one"
            )
        if self.eval_share is not None and not 0 < self.eval_share < 1:
            raise ValueError(f"--eval_share must be above 0 and below 1; got {self.eval_share}")
        if self.eval_share is not None and self.eval_split is not None:
            raise ValueError("--eval_share and --eval_split exclude each other")

    @property
    def sets(self) -> list[DataSet]:
        """The data sets, with what each flag says of each."""
        return read_sets(
            self.data,
            data_root=self.data_root,
            split=self.split,
            captions=self.captions,
            eval_split=self.eval_split,
            maps=self.maps,
        )

    @property
    def validates(self) -> bool:
        """Whether a part of the data is held out."""
        return self.eval_share is not None or any(one.eval_split for one in self.sets)

    @property
    def output_dir(self) -> str:
        """Where a run goes that was not told where."""
        return f"runs/{'+'.join(one.name for one in self.sets)}-{'plain' if self.plain else self.mode}"

    @property
    def of_model(self) -> ModelFlags:
        return ModelFlags(**{field.name: getattr(self, field.name) for field in fields(ModelFlags)})


def refuse_idle(flags: ModelFlags) -> None:
    """Raises ValueError for a flag that was given another value than its default although nothing would read it."""
    own, full = AGGREGATIONS[flags.aggregate].reads == "host", flags.mode == "full"
    adapters = ("lora_r", "lora_alpha", "lora_dropout", "lora_targets")
    cases = (
        (own, ("parallel_start", "parallel_rank"), f"--aggregate {flags.aggregate} reads the host's own attention"),
        (full, ("parallel_rank",), "--full trains full copies of the host's projections"),
        (full, adapters, "--full has no adapters"),
        (flags.aligner == "none", ("aligner_kernel", "aligner_norm"), "--aligner none has no network"),
    )
    defaults = {field.name: field.default for field in fields(ModelFlags)}
    for idle, names, why in cases:
        for name in names:
            if idle and getattr(flags, name) != defaults[name]:
                raise ValueError(f"--{name} {getattr(flags, name)} would change nothing: {why}")


def steps_or_share(given: float) -> float:
    """--pretrain_aligner_steps: a share below 1 as it is, whole steps as a whole number. Raises ValueError for what is neither."""
    if 0 <= given < 1 or (given >= 1 and float(given).is_integer()):
        return given if 0 < given < 1 else int(given)
    raise ValueError(
        f"--pretrain_aligner_steps must be a share of the run below 1, such as 0.1, or a whole number of steps; got {given}"
    )
