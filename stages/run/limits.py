"""What ends a training before its last step: BUDGET, DEADLINE, and the notice that EC2 takes a spot
instance away.

The stage watches, for every backend alike, and leaves a file in the training's work folder. The
torch workers look for it after each step and save a checkpoint. Standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

from stages.run.cost import dollars, hourly_price, instance_type
from stages.run.errors import InputError, StageFailure, Stopped
from stages.run.layout import REHEARSAL_FOLDER, REHEARSAL_REPORT, STOP_FILE
from stages.run.manifest import manifest_of
from stages.run.progress import duration
from stages.run.settings import Settings
from stages.run.sizes import parse_duration

SPENT_FILE = "spent.json"  # in the work folder: {"seconds": of all starts of this training}
POLL_SECONDS, WRITE_SECONDS, NOTICE_SECONDS = 0.5, 10.0, 5.0
# The variable with which AWS's own libraries find another metadata service, as tests do.
METADATA = "AWS_EC2_METADATA_SERVICE_ENDPOINT"
NOTICE = "/latest/meta-data/spot/instance-action"
BEFORE_TRAIN = ("data", "precompile")


@dataclass(frozen=True)
class Spent:
    """Seconds of a run: of what was published before its training, and of the training."""

    before: float
    training: float

    @property
    def seconds(self) -> float:
        return self.before + self.training


def spent(work: Path, run_folder: Path) -> Spent:
    """What the run in `run_folder` took up to now, with its last rehearsal and all starts of the
    training in `work`."""
    manifests = [manifest_of(run_folder / stage) or {} for stage in BEFORE_TRAIN]
    before = sum(float(one.get("seconds") or 0.0) for one in manifests)
    rehearsed = _seconds_in(run_folder / REHEARSAL_FOLDER / REHEARSAL_REPORT)
    return Spent(before + rehearsed, _seconds_in(work / SPENT_FILE))


def _seconds_in(file: Path) -> float:
    try:
        return float(json.loads(file.read_bytes())["seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def limit_problems(settings: Settings) -> Iterator[str]:
    """Why BUDGET cannot be kept here."""
    if settings.budget and hourly_price(settings) is None:
        yield (
            f"BUDGET={settings.budget:g} USD: the price of this machine is not known. Set "
            "INSTANCE_PRICE, or DEADLINE in its place."
        )


def reached(settings: Settings, so_far: Spent) -> str:
    """The limit that `so_far` has reached, with the numbers; empty where there is none."""
    found = []
    price = hourly_price(settings) if settings.budget else None
    if price is not None and dollars(so_far.seconds, price) >= settings.budget:
        found.append(f"BUDGET={settings.budget:g} USD ({dollars(so_far.seconds, price):.2f} spent)")
    if settings.deadline and so_far.seconds >= parse_duration(settings.deadline):
        found.append(f"DEADLINE={settings.deadline} ({duration(so_far.seconds)} taken)")
    return " and ".join(found)


def require_within(settings: Settings, so_far: Spent, planned: float | None) -> None:
    """Raise InputError where a limit is reached, or would be after `planned` seconds more."""
    remedy = "Raise it, or train fewer steps (MAX_STEPS, NUM_TRAIN_EPOCHS)."
    if limit := reached(settings, so_far):
        raise InputError(f"{limit}: it is used up before this start. {remedy}")
    if planned is None and (settings.budget or settings.deadline):
        print(
            "note: how long the training takes is not known, as precompile measured no step: it is "
            "ended when it gets to its limit.",
            flush=True,
        )
    after = Spent(so_far.before, so_far.training + (planned or 0.0))
    if limit := reached(settings, after):
        raise InputError(
            f"{limit.replace(' spent', ' planned').replace(' taken', ' planned')}: the training is "
            f"planned to take {duration(planned or 0.0)} more. {remedy}"
        )


@contextmanager
def limited(settings: Settings, work: Path, run_folder: Path) -> Iterator[None]:
    """Within it the training in `work` is counted, and ended at a limit or at EC2's notice."""
    for left in (STOP_FILE, f"{STOP_FILE}.writing"):  # by a former start
        (work / left).unlink(missing_ok=True)
    watch = _Watch(settings, work, spent(work, run_folder))
    thread = Thread(target=watch.until_ended, name="limits", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watch.ended.set()
        thread.join()


def stopped(work: Path) -> StageFailure | None:
    """Why the training in `work` is to end; None while it is not."""
    try:
        kind, _, reason = (work / STOP_FILE).read_text(encoding="utf-8").partition("\n")
    except FileNotFoundError:
        return None
    return Stopped(reason) if kind == Stopped.__name__ else StageFailure(reason)


class _Watch:
    def __init__(self, settings: Settings, work: Path, before: Spent):
        self.ended = Event()
        self._settings, self._work, self._before = settings, work, before
        self._since = time.monotonic()

    def until_ended(self) -> None:
        written = noticed = self._since
        address = _metadata_address()
        if address and not answers(address):
            print(
                f"note: EC2's metadata service {address} does not answer: no notice that a spot "
                "instance is taken away would be seen. In a container its hop limit must be 2.",
                file=sys.stderr,
                flush=True,
            )
        while not self.ended.wait(POLL_SECONDS):
            now = time.monotonic()
            if now - written >= WRITE_SECONDS:
                self._write()
                written = now
            if limit := reached(self._settings, self._so_far()):
                self._stop(StageFailure(f"{limit} is used up. Raise it to go on."))
            elif address and now - noticed >= NOTICE_SECONDS:
                noticed = now
                if when := spot_notice(address):
                    self._stop(
                        Stopped(
                            f"EC2 takes this spot instance away at {when}. The same command goes "
                            "on elsewhere."
                        )
                    )
        self._write()

    def _so_far(self) -> Spent:
        seconds = time.monotonic() - self._since
        return Spent(self._before.before, self._before.training + seconds)

    def _write(self) -> None:
        text = json.dumps({"seconds": round(self._so_far().training, 3)})
        self._put(SPENT_FILE, text)

    def _stop(self, error: StageFailure) -> None:
        self._put(STOP_FILE, f"{type(error).__name__}\n{error}")

    def _put(self, name: str, text: str) -> None:
        """Write a file of the work folder in one step: a kill leaves the former whole."""
        beside = self._work / f"{name}.writing"
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(self._work / name)
        except OSError:  # a full disk: the next turn of the watch tries again
            beside.unlink(missing_ok=True)


def _metadata_address() -> str:
    """Where EC2's instance metadata is; empty where this is no EC2 instance."""
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return ""
    given = os.environ.get(METADATA, "").rstrip("/")
    return given or ("http://169.254.169.254" if instance_type() else "")


def spot_notice(address: str) -> str:
    """The time at which EC2 takes this instance away, as it says; empty where it does not.

    docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html: the document
    is there from two minutes before.
    """
    try:
        headers = {"X-aws-ec2-metadata-token": _token(address)}
        return str(json.loads(_asked(f"{address}{NOTICE}", "GET", headers))["time"])
    except (OSError, ValueError, KeyError, TypeError):  # 404 until then
        return ""


def answers(address: str) -> bool:
    """Whether the metadata service gives a token, without which a notice is not seen."""
    try:
        return bool(_token(address))
    except (OSError, ValueError):
        return False


def _token(address: str) -> str:
    """The token of IMDSv2."""
    seconds = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    return _asked(f"{address}/latest/api/token", "PUT", seconds)


def _asked(url: str, method: str, headers: dict[str, str]) -> str:
    import urllib.request  # 30 ms that only a training need spend
    from http.client import HTTPException

    request = urllib.request.Request(url, method=method, headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return str(opener.open(request, timeout=2).read().decode())
    except HTTPException as error:  # an answer that is no HTTP
        raise OSError(f"{url}: {error}") from error
