# ruff: noqa: RUF009 - `setting` makes a field
"""The settings that all recipes share, in groups."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Literal

from sfumato.train.fields import NEEDED, Names, Options, Size, setting


@dc.dataclass(frozen=True)
class Start:
    """The model that the training starts from."""

    source: str = setting(NEEDED, "A folder, a single-file checkpoint or a hub id.", flag="-m,--model")
    revision: str | None = setting(None, "Of a hub id: a branch, a tag or a commit.")
    variant: str | None = setting(None, "Of a folder or hub id: which of its files, such as fp16.")
    vae: str | None = setting(None, "Another autoencoder: a path or hub id.")
    blank: bool = setting(False, "--model is a folder of configurations without weights: start from random numbers.")


@dc.dataclass(frozen=True)
class Data:
    """Pictures and texts."""

    source: str = setting(NEEDED, "A folder with metadata.jsonl, a plain folder of pictures with their texts in .txt "
                          "files or in their names, a folder of parquet, arrow or tar files, or the name of a data set "
                          "on the hub.", flag="-d,--data")  # fmt: skip
    text: str | None = setting(None, "One text for all pictures instead of their own.", flag="--caption")
    image_column: str = setting("image", "The column of the pictures, in a data set.")
    text_column: str = setting("text", "The column, or the key in metadata.jsonl, of the texts.")
    conditioning_column: str | None = setting(
        None, "The same of the control pictures, or of the pictures before an edit; conditioning_image if it is there."
    )
    split: str = setting("train", "Of a data set.")
    streaming: bool = setting(False, "Read a data set while it is trained on, without storing it.")
    options: Options = setting({}, "A further setting of datasets.load_dataset.", flag="--data-option")
    size: Size | None = setting(None, "Width and height that is trained at; the model's own.", metavar="WxH")
    buckets: bool = setting(False, "Train each picture at the size nearest to its proportions, of many of that area.")
    bucket_step: int = setting(64, "What the sizes of --buckets are multiples of.")
    batch: int = setting(1, "Pictures a step, of all devices and processes together.")
    flip: bool = setting(False, "Mirror half of the pictures.")
    crop: bool = setting(False, "Crop at a place drawn at random, not in the middle.")
    zoom: float = setting(1.0, "Enlarge pictures by a factor drawn from 1 to this before --crop.")
    control: Names = setting((), "Make the control pictures by an annotator (`sfumato annotators`); may be repeated, "
                             "and several take turns.", metavar="ANNOTATOR")  # fmt: skip
    control_options: Options = setting({}, "A setting of the annotator, such as low=50.", flag="--control-option")
    cached: Literal["memory", "disk"] | None = setting(
        None, "Pass every picture and text through the autoencoder and those text encoders that are not trained once, "
        "before training, and keep what they say in memory or, under --out, on disk."
    )  # fmt: skip
    skip_broken: bool = setting(False, "Leave out pictures that cannot be read.")
    threads: int = setting(4, "Threads that read pictures.", free=True)
    workers: int = setting(0, "Processes that read pictures, instead of threads.", free=True)
    window: int = setting(1024, "Rows of a stream that are shuffled together.")


@dc.dataclass(frozen=True)
class Objective:
    """What is minimised."""

    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = setting(
        None, "What the network tells of noised latents; what the model says."
    )
    min_snr: float | None = setting(None, "gamma of min-SNR weights (arXiv:2303.09556); 5 is usual. None: no weights.")
    snr_floor: float = setting(
        0.0, "Added to the SNR of --min-snr; 1 gives the noisiest times of a velocity full weight."
    )
    offset: float = setting(0.0, "Deviation of offset noise; 0.1 is usual.")
    dropout: float | None = setting(None, "Share of pictures that go without their text, for guidance.")
    stratified: bool = setting(False, "Spread the times of a batch evenly.")


@dc.dataclass(frozen=True)
class Optimizer:
    """How the weights are moved."""

    steps: int | None = setting(None, "Steps of training.", free=True)
    name: str = setting("adamw", "Any of optax and optax.contrib, by its name there.", flag="--optimizer")
    learning_rate: float | None = setting(None, "The highest one of the schedule.", flag="--learning-rate,--lr")
    schedule: str = setting("constant", "constant, linear, cosine, or any of optax, by its name there.")
    warmup: int = setting(0, "Steps up to the learning rate.")
    options: Options = setting({}, "A setting of the optimizer, such as b1=0.95.", flag="--optimizer-option")
    schedule_options: Options = setting({}, "A setting of the schedule, such as end_value=1e-6.",
                                        flag="--schedule-option")  # fmt: skip
    rates_by: Options = setting({}, "A factor of the learning rate for a component, such as text_encoder=0.5.",
                                flag="--rate", metavar="COMPONENT=FACTOR")  # fmt: skip
    clip: float = setting(1.0, "The largest norm of all gradients together; 0 leaves them as they are.")
    ema: float = setting(0.0, "Decay of a moving average of the weights, such as 0.9999, which is what is exported "
                         "then; 0: none.")  # fmt: skip
    accumulate: int = setting(1, "Parts that a batch is computed in, one after another, to save memory.")


@dc.dataclass(frozen=True)
class Run:
    """Where to, how often, how exactly."""

    out: str = setting(NEEDED, "A folder for all that comes of the run; a run that was broken off there goes on.",
                       flag="-o,--out", free=True)  # fmt: skip
    seed: int = setting(0, "All that is random follows from it.")
    save_every: int = setting(500, "Steps between checkpoints.", free=True)
    keep: int = setting(2, "How many of the last checkpoints to keep.", free=True)
    best: str = setting("loss", "Keep the checkpoint with the smallest value of this metric, too.")
    resume: bool = setting(True, "Go on with a run that was broken off in --out.", free=True)
    tensorboard: bool = setting(False, "Write the metrics for TensorBoard, too.", free=True)
    quiet: bool = setting(False, "Print nothing but mistakes.", free=True)
    dtype: Literal["float32", "bfloat16", "float16"] | None = setting(
        None, "What is computed in: bfloat16, on CPU float32. The weights themselves are float32."
    )
    remat: bool = setting(False, "Gradient checkpointing: less memory, more time.")


@dc.dataclass(frozen=True)
class Parallel:
    """Devices and processes. Each process is started with the same flags but for --process."""

    devices: int | None = setting(None, "How many devices to use; all of all processes.", free=True)
    fsdp: bool = setting(False, "Divide weights and optimizer over the devices, too.", free=True)
    coordinator: str | None = setting(None, "Where process 0 listens for the others.", metavar="HOST:PORT", free=True)
    processes: int | None = setting(None, "How many processes there are.", free=True)
    process: int | None = setting(None, "The number of this one, from 0 on.", free=True)


@dc.dataclass(frozen=True)
class Samples:
    """Contact sheets of pictures that are drawn again and again."""

    prompts: Names = setting((), "A prompt to draw.", flag="--sample", metavar="PROMPT", free=True)
    prompts_file: str | None = setting(None, "A file with a prompt a line.", flag="--samples-file", free=True)
    pictures: Names = setting((), "A picture to start from: a control picture, a picture to edit, one to rebuild. "
                              "One for each prompt, or one for all.", flag="--sample-picture", free=True)  # fmt: skip
    negative: str | None = setting(None, "What not to draw.", flag="--sample-negative", free=True)
    every: int = setting(500, "Steps between contact sheets; the last one is drawn at the end.",
                         flag="--sample-every", free=True)  # fmt: skip
    steps: int = setting(20, "Steps of the sampler.", flag="--sample-steps", free=True)
    guidance: float = setting(7.5, "How closely to follow the prompts.", flag="--sample-guidance", free=True)
    sampler: str | None = setting(None, "One of `sfumato samplers`; the model's own.", flag="--sample-sampler",
                                  free=True)  # fmt: skip
    size: Size | None = setting(None, "Width and height; what is trained at.", flag="--sample-size", metavar="WxH",
                                free=True)  # fmt: skip
    seed: int = setting(0, "Of the first picture; the others follow.", flag="--sample-seed", free=True)


GROUPS: Mapping[str, type] = {
    "model": Start, "data": Data, "objective": Objective, "optimizer": Optimizer, "run": Run, "parallel": Parallel,
    "samples": Samples,
}  # fmt: skip
PANELS: Mapping[str, str] = {
    "model": "Model", "data": "Data", "recipe": "Recipe", "objective": "Objective", "optimizer": "Optimizer",
    "run": "Run", "parallel": "Devices and processes", "samples": "Sample pictures",
}  # fmt: skip
