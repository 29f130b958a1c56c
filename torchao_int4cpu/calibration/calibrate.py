"""`calibrate`: a model's weights into 4 bits for the inputs that they have on some batches."""

from __future__ import annotations

import contextlib
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchao_int4cpu.algorithms.hessian import DAMPING
from torchao_int4cpu.calibration.bits import Measuring, check_bits, choose_options, some_of
from torchao_int4cpu.calibration.blocks import Batch
from torchao_int4cpu.calibration.run import Memory, Progress, Run
from torchao_int4cpu.calibration.store import Store
from torchao_int4cpu.calibration.targets import (
    ENOUGH_ROWS,
    CalibratedWeight,
    Rules,
    Target,
    choose,
    left_behind,
)
from torchao_int4cpu.calibration.work import Quantizing, settings_of
from torchao_int4cpu.quantize.config import Int4WeightOnlyConfig
from torchao_int4cpu.quantize.parameter import warn_untied
from torchao_int4cpu.quantize.run import chosen_by

#: The name of this way of quantizing, beside those of `algorithms.choose_qparams`.
GPTQ = "gptq"

#: The folder of a run, within the one to resume from, that holds weights that are done.
WEIGHTS = "weights"


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` did."""

    weights: list[CalibratedWeight]

    @property
    def calibrated(self) -> list[CalibratedWeight]:
        """Those quantized for their inputs."""
        return [weight for weight in self.weights if not weight.rounded]

    @property
    def rounded(self) -> list[CalibratedWeight]:
        """Those of whose inputs nothing, or too little, is known."""
        return [weight for weight in self.weights if weight.rounded]

    @property
    def bits(self) -> float:
        """A number with its part of scales and zeros: the mean of what was quantized for its inputs."""
        numel = sum(weight.numel for weight in self.calibrated)
        return 8 * sum(weight.nbytes for weight in self.calibrated) / numel if numel else 0.0

    def __str__(self) -> str:
        told = [
            f"{len(self.calibrated)} of {len(self.weights)} matrices are quantized for their inputs"
        ]
        if self.calibrated:
            worst = max(self.calibrated, key=lambda weight: weight.error)
            median = statistics.median(weight.error for weight in self.calibrated)
            told[0] += (
                f": their outputs are {100 * median:.1f}% off (median), {100 * worst.error:.1f}% at "
                f"most ({worst.name})"
            )
        sizes = Counter(weight.group_size for weight in self.calibrated)
        if len(sizes) > 1:
            each = ", ".join(f"{count} of {size}" for size, count in sorted(sizes.items()))
            told.append(f"group sizes: {each}; {self.bits:.3f} bits a weight")
        reasons: dict[str, list[str]] = {}
        for weight in self.rounded:
            reasons.setdefault(weight.rounded, []).append(weight.name)
        told += [f"rounded by mse, as {why}: {', '.join(names)}" for why, names in reasons.items()]
        return "\n".join(told)


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    config: Any = None,
    *,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    target_bits: float | None = None,
    sequential: bool = True,
    damping: float = DAMPING,
    enough_rows: int = ENOUGH_ROWS,
    resume: Path | str | None = None,
    progress: bool | Progress = True,
) -> Calibration:
    """Quantize a model in place by GPTQ, for the inputs that its weights have on some batches.

    Block by block: the inputs of a block are those that the blocks before it give, 4-bit already. A
    block is run twice for each batch, so all of it takes about two runs of the model over the batches,
    and the time that the weights take. Scales and zeros are chosen as by ``"mse"``, whatever the config
    says, and so are weights that no product with was seen, and experts that too few tokens reached.

    Args:
        model: on the CPU. Until the end its float weights are kept: after an error it is as it was.
        batches: what the model is called with, one after the other: a tensor, a mapping of keyword
            arguments, or a sequence of arguments.
        config: an `Int4WeightOnlyConfig`, or an ``FqnToConfig`` of such; groups of 128 if None.
        filter_fn: as that of `quantize_`.
        target_bits: of a number with its part of scales and zeros. Each weight gets a group size of its
            own then, whatever the config says, by what each size costs the hidden states behind its
            block. That is measured first, on a part of the batches.
        sequential: whether a block sees what the 4-bit blocks before it give; else what the float ones
            do, and it is run once for each batch.
        damping: see `algorithms.hessian`.
        enough_rows: of activations for a weight, or an expert, to be quantized for its inputs.
        resume: a directory for the blocks that are done. A call with the same arguments goes on with
            what it finds there; the result is the same.
        progress: whether to show a bar (if tqdm is installed), or what is told instead.

    Returns:
        What became of each weight. ``print`` shows a summary.

    Raises:
        TypeError, ValueError: a batch, the config or a weight breaks a rule; nothing is changed.
    """
    config = Int4WeightOnlyConfig() if config is None else config
    known = check_batches(batches)
    targets, report = choose(model, config, filter_fn)
    rules = Rules(damping, enough_rows)
    folder = None if resume is None else Path(resume)
    with progress_bar(progress) as tell, prepared(model):
        if target_bits is not None:
            targets = with_bits(model, known, targets, tell, target_bits, folder=folder)
        work = Quantizing(rules, sequential)
        if folder is not None:
            settings = settings_of(known, targets, sequential=sequential, **vars(rules))
            work.store = Store(folder / WEIGHTS, settings)
        before = {target: target.weight for target in targets}
        untied = left_behind(model, targets)
        try:
            Run(model, known, targets, work, tell).stages()
        except BaseException:
            for target, weight in before.items():
                target.put(weight)
            raise
    for name, others in untied.items():
        warn_untied(name, others)
    report.tell(model, chosen_by(config))
    return Calibration(work.told)


def with_bits(
    model: nn.Module,
    batches: list[Batch],
    targets: list[Target],
    tell: Progress,
    target_bits: float,
    *,
    folder: Path | None = None,
    memory: Memory | None = None,
    **settings: Any,
) -> list[Target]:
    """The same weights in group sizes by which they take so many bits; see `calibrate`.

    Args:
        model, batches, targets, tell, target_bits, memory: see `calibrate` and `Run`.
        folder: for what was measured, or None.
        settings: what else an earlier call must agree in, for this one to go on with what it began.
    """
    check_bits(targets, target_bits)
    some, work = some_of(batches), Measuring()
    if folder is not None:
        work.store = Store(folder / "measured", settings_of(some, targets, **settings))
    Run(model, some, targets, work, tell, memory).stages()
    numel = sum(target.weight.numel() for target in targets)
    options = [work.options[target.name] for target in targets]
    chosen = choose_options(options, int(target_bits * numel / 8))
    return [target.in_groups(option.group_size) for target, option in zip(targets, chosen)]


def check_batches(batches: Iterable[Batch]) -> list[Batch]:
    """As a list.

    Raises:
        TypeError: it is no list of batches, or one of them has no tensor.
        ValueError: there are none, or one has NaN or infinite values.
    """
    if isinstance(batches, (Tensor, Mapping, str)):
        raise TypeError(
            f"batches is a {type(batches).__name__}; give a list of what the model is called with, one "
            "after the other"
        )
    known = list(batches)
    if not known:
        raise ValueError(
            "there are no batches; give some, of 32768 tokens together if that is possible"
        )
    for i, batch in enumerate(known):
        tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        if not tensors or isinstance(batch, str):
            raise TypeError(
                f"batch {i} is a {type(batch).__name__} without a tensor; give what the model is "
                "called with, text through its tokenizer"
            )
        for tensor in tensors:
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise ValueError(f"batch {i} has NaN or infinite values; leave it out")
    return known


@contextlib.contextmanager
def progress_bar(progress: bool | Progress) -> Iterator[Progress]:
    """A bar on a terminal if tqdm is installed; or what is told instead."""
    if callable(progress):
        yield progress
        return
    try:
        from tqdm import tqdm
    except ImportError:
        progress = False
    if not progress:
        yield lambda name, done, total: None
        return
    with tqdm(disable=None, dynamic_ncols=True, unit="step") as bar:

        def show(name: str, done: int, total: int) -> None:
            bar.total = total
            bar.set_description(name, refresh=False)
            bar.update(done - bar.n)

        yield show


@contextlib.contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Without dropout, gradients, a cache of keys and values, or products that cannot be seen."""
    modes = {module: module.training for module in model.modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    # Of transformers; parts of a model have configs of their own.
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None))}
    cached = [config for config in configs.values() if getattr(config, "use_cache", None)]
    gathering = [  # copies of the experts' weights
        config
        for config in configs.values()
        if getattr(config, "_experts_implementation", None) == "batched_mm"
    ]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        for config in cached:
            config.use_cache = False
        for config in gathering:
            config._experts_implementation = "grouped_mm"
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for module, mode in modes.items():
            module.training = mode
        for config in cached:
            config.use_cache = True
        for config in gathering:
            config._experts_implementation = "batched_mm"
