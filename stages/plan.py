"""Say what would run, what it needs and what it costs, before it starts.

    python -m stages.plan outputs/RUN STAGE:INPUTS:AFTER ...

Arithmetic on config.json, the settings and the manifests on this machine. Nothing is started or
written, and nothing but the config.json of a model on the Hub is fetched; TRACE=1 traces a step.
Each figure has its basis; what is not known is said to be unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import click

from stages.backends.schedule import data_parallel_size, sequences_per_step, total_steps
from stages.forecast.accuracy import accuracy
from stages.forecast.fits import LAUNCHERS, in_all, need_of, verdict
from stages.forecast.machine import Place, place_of
from stages.forecast.minutes import LEAST_WRITTEN, Estimate, write_rate
from stages.forecast.parameters import Shape, trainable
from stages.forecast.planned import by_precompile, config_here, estimate, rows_of, shape_here
from stages.forecast.prices import compare_lines, price_lines
from stages.forecast.traced import traced_bytes
from stages.make.stale import Graph, parse_graph, stale_stages, typed_problems
from stages.model.size import bytes_written
from stages.run import allocator
from stages.run.cli import with_exit_status
from stages.run.cost import dollars
from stages.run.disk import free_space
from stages.run.errors import InputError, refuse
from stages.run.manifest import manifest_of
from stages.run.progress import duration, show_size
from stages.run.provenance import provenance_now
from stages.run.publish import work_folder
from stages.run.settings import Settings

REASONS = 5  # of a stale stage that are shown: another backend has dozens
# neuronx-cc on an 8B was killed with the 32 GB of a trn1.2xlarge (aws-neuron-sdk, issue 1222).
COMPILER_HOST, COMPILER_PARAMETERS = 32 * 2**30, 7_000_000_000
# Peak of a consolidation of 1.3 GB of either backend, which passes blocks of 2 MB through
# (tests/benchmarks/results/2026-11-28-host-stages.md).
CONSOLIDATE_HOST = 340 * 10**6


@click.command(help=__doc__)
@click.argument("run_folder", type=click.Path(path_type=Path))
@click.argument("graph", nargs=-1)
@click.option("--given", default="", help="Names of the settings on make's command line.")
def main(run_folder: Path, graph: tuple[str, ...], given: str) -> None:
    def work() -> None:
        refuse(typed_problems(given.split(), []))
        for line in lines(Settings.read(), run_folder, parse_graph(list(graph))[0]):
            print(line)

    with_exit_status(work, run_folder)


def lines(settings: Settings, run_folder: Path, graph: Graph) -> Iterator[str]:
    """The plan, line by line."""
    place, shape = place_of(settings), shape_here(settings)
    problem = ""
    if shape is None:
        problem = _fetch_config(settings)
        shape = shape_here(settings)
    stale = stale_stages(graph, run_folder, settings)
    known = "data" not in stale
    yield f"plan of {run_folder} on {place.name} ({place.device}, {place.backend} backend)"
    yield from _section("stages", _stages(settings, run_folder, graph, stale, place, shape))
    yield from _section("tokens", _tokens(settings, run_folder, known))
    yield from _section("model", _model(settings, shape, problem))
    if shape is not None:
        measured = by_precompile(run_folder).peak_memory
        measured = measured if place.here and "precompile" not in stale else None
        yield from _section("memory", _memory(settings, shape, place, measured))
        yield from _section("disk", _disk(settings, shape, place, run_folder))
    yield from _section("price", price_lines(settings, place, run_folder, stale, shape))
    if settings.compare:
        yield from _section("compare", compare_lines(settings, run_folder, shape))
    yield from _section("so far", accuracy(run_folder.parent, place))


def _fetch_config(settings: Settings) -> str:
    """Fetch config.json of a model on the Hub, a few kB; returns why that failed, else nothing."""
    from stages.model.base import config_folder

    try:
        config_folder(settings.model_id, settings.model_revision)
    except InputError as error:
        return str(error)
    return ""


def _section(name: str, body: Iterator[str]) -> Iterator[str]:
    for index, line in enumerate(body):
        yield f"{name if index == 0 else '':<9}{line}"


def _stages(
    settings: Settings,
    run_folder: Path,
    graph: Graph,
    stale: dict[str, list[str]],
    place: Place,
    shape: Shape | None,
) -> Iterator[str]:
    total, unknown = 0.0, []
    for stage in graph:
        if stage not in stale:
            yield f"{stage:<18} up to date"
            continue
        state = "missing" if manifest_of(run_folder / stage) is None else "stale"
        time = estimate(stage, settings, run_folder, place, shape, stale)
        rest = None
        if stage == "train" and not stale.keys() & set(graph["train"]):
            rest = _partly_done(settings, run_folder, graph)
        if rest and time.seconds is not None:
            left = time.seconds * (1 - rest[0] / rest[1])
            time = Estimate(left, f"{time.basis}, of the steps that remain")
        total += time.seconds or 0
        unknown += [stage] if time.seconds is None else []
        more = f"; and {len(stale[stage]) - REASONS} more, see make why STAGE={stage}"
        more = more if len(stale[stage]) > REASONS else ""
        reason = "" if state == "missing" else f": {'; '.join(stale[stage][:REASONS])}{more}"
        if rest:
            reason += "; goes on at step {:,} of {:,}".format(*rest)
        yield f"{stage:<18} {state}{reason}"
        yield f"{'':<18}   {_cost(time.seconds, place)} ({time.basis})"
    if stale and total:
        but = f", without {', '.join(unknown)}" if unknown else ""
        yield f"{'to run, in all':<18} {_cost(total, place)}{but}"


def _cost(seconds: float | None, place: Place) -> str:
    if seconds is None:
        return "unknown"
    price = f", {dollars(seconds, place.price):.2f} USD" if place.price else ", price unknown"
    return f"{duration(seconds)}{price}"


def _partly_done(settings: Settings, run_folder: Path, graph: Graph) -> tuple[int, int] | None:
    """The step at which a training that was interrupted goes on, and its last; None where none
    was."""
    inputs = {name: run_folder / name for name in graph["train"]}
    made_from, _ = provenance_now("train", settings, inputs, manifest_of(run_folder / "train"))
    folder = work_folder(run_folder, "train", made_from) / "checkpoints"
    steps = [int(path.name[5:]) for path in folder.glob("step-*") if path.name[5:].isdigit()]
    rows = rows_of(run_folder)
    if not steps or rows is None:
        return None
    return max(steps), total_steps(settings, rows)


def _tokens(settings: Settings, run_folder: Path, known: bool) -> Iterator[str]:
    batch = sequences_per_step(settings)
    yield (
        f"global batch {batch:,} sequences = {settings.per_device_train_batch_size} per rank x "
        f"{settings.gradient_accumulation_steps} accumulation x {data_parallel_size(settings)} DP"
    )
    rows = rows_of(run_folder) if known else None
    if rows is None:
        yield "documents, tokens, sequences, steps: unknown until `make data` has run"
        return
    metrics = (manifest_of(run_folder / "data") or {})["metrics"]
    steps = total_steps(settings, rows)
    yield (
        f"{metrics['train']['documents']:,} documents, {metrics['train']['packed']:,} tokens in "
        f"{rows:,} sequences of {settings.max_length:,} (run {run_folder.name}'s data)"
    )
    how = (
        f"ceil({rows:,} x {settings.num_train_epochs:g} epochs / {batch:,})"
        if settings.max_steps < 0
        else "MAX_STEPS"
    )
    yield f"{steps:,} steps = {how}; {steps * batch * settings.max_length:,} tokens trained on"


def _model(settings: Settings, shape: Shape | None, problem: str) -> Iterator[str]:
    if shape is None:
        kind = (
            f"MODEL_ID={settings.model_id}: its config.json is of no architecture that is trained"
        )
        yield f"unknown, and with it memory and disk. {problem or kind}"
        return
    embeddings = 1 if shape.tied else 2
    yield (
        f"{shape.parameters:,} parameters = {shape.layers} layers x {shape.layer:,} + {embeddings} "
        f"x {shape.embedding:,} embeddings + {shape.hidden:,}"
    )
    yield (
        f"{trainable(shape, settings):,} are trained"
        f"{f': LORA_R={settings.lora_r}' if settings.lora_r else ''}"
    )
    flop = shape.flop_per_token(settings.max_length, not settings.lora_r)
    yield f"{flop / 1e9:,.2f} GFLOP a token at MAX_LENGTH={settings.max_length} (arithmetic)"


def _memory(settings: Settings, shape: Shape, place: Place, measured: int | None) -> Iterator[str]:
    traced = traced_bytes(settings, config_here(settings), place, make=settings.trace)
    if settings.trace and traced is None:
        yield "TRACE=1: no trace holds here (LoRA, optimum-neuron, or a peak at another moment)"
    need = need_of(shape, settings, place, traced)
    for part in need.parts:
        yield f"{part.name:<22} {show_size(part.bytes):>8}  {part.basis}"
    total = in_all(need.bytes, settings, place)
    ranks = " of a rank"
    if place.device == "cpu":
        yield f"{'beside the ranks':<22} {show_size(LAUNCHERS):>8}  torchrun and the stage"
        ranks = f", ranks x {settings.nproc_per_node}"
    yield f"{'in all' + ranks:<22} {show_size(total):>8}  {need.moment}"
    if measured is not None:
        total = in_all(measured, settings, place)
        yield f"{'':<22} {show_size(total):>8}  measured by precompile in this run"
    elif place.device == "cpu" and (advice := allocator.advice()):
        yield f"the heap's gaps are not counted, and the allocator is {advice}"
    yield verdict(settings, shape, place, total)
    yield (
        f"with GRADIENT_CHECKPOINTING={int(not settings.gradient_checkpointing)} a rank has "
        f"{show_size(need_of(shape, _other(settings), place).bytes)} (arithmetic)"
    )
    yield from _host(settings, shape, place)


def _host(settings: Settings, shape: Shape, place: Place) -> Iterator[str]:
    """What the host's memory must hold beside a rank's own."""
    largest = max(shape.embedding, *(matrix.parameters for matrix in shape.matrices))
    yield (
        f"host: a rank loads a tensor at a time, at most {show_size(4 * largest)}: {largest:,} x 4 "
        "(arithmetic)"
        if place.backend == "torch"
        else "host: what a rank takes to load is unknown: optimum-neuron's was not measured"
    )
    adapters = 4 * trainable(shape, settings) if settings.lora_r else 0
    more = f", and {show_size(adapters)} of adapters" if adapters else ""
    yield (
        f"host: consolidate, {show_size(CONSOLIDATE_HOST + adapters)} whatever the model's size: "
        f"a process and blocks of 2 MB, measured with 1.3 GB{more}"
    )
    if place.backend == "neuron" and shape.parameters > COMPILER_PARAMETERS:
        enough = place.host_memory is None or place.host_memory > COMPILER_HOST
        yield (
            f"host: {show_size(place.host_memory or 0)}; the compiler of an 8B was killed with 32 "
            f"GB (aws-neuron-sdk, issue 1222){'' if enough else ': compile on a larger machine'}"
        )


def _other(settings: Settings) -> Settings:
    return replace(settings, gradient_checkpointing=not settings.gradient_checkpointing)


def _disk(settings: Settings, shape: Shape, place: Place, run_folder: Path) -> Iterator[str]:
    sizes = bytes_written(settings, shape.parameters, place.backend)
    parts = ", ".join(f"{name} {show_size(size)}" for name, size in sizes.items() if size)
    free = show_size(free_space(run_folder))
    yield f"{show_size(sum(sizes.values()))} at most ({parts}); {free} free"
    rate = write_rate(place, run_folder.parent)
    if rate is None:
        least = f"no consolidate wrote {show_size(LEAST_WRITTEN)} on this machine"
        why = least if place.here else f"nobody measured a {place.name}"
        yield f"how long writing takes is unknown: {why}"
        return
    sizes["checkpoints"] //= settings.save_total_limit + 1
    times = ", ".join(
        f"{'a checkpoint' if name == 'checkpoints' else name} {duration(size / rate[0])}"
        for name, size in sizes.items()
        if size
    )
    speed = f"{show_size(int(rate[0]))}/s of run {rate[1]}'s consolidate once it had started"
    yield f"writing: {times}, at the {speed}"


if __name__ == "__main__":
    main()
