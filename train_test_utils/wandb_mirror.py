"""Weights & Biases as a mirror of the logbook. Nothing here may stop a run, wait for a person, or wait long for a
network.

wandb itself asks for a key at a terminal, raises without one, and waits 90 s for a network that is not there; so the
key is looked for first, waiting is bounded, and whatever it raises is said once and then left alone.
"""

from __future__ import annotations

import netrc
import os
import re
import secrets
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .output import first_line, say

PROJECT = "ternary-vision"  # unless WANDB_PROJECT says otherwise
CONNECT_SECONDS = 15.0
UPLOAD_SECONDS = 60.0
BYTES_A_SECOND = 250_000  # of packed files: they may take longer
# Of a row: they are configuration, not figures.
NESTED = ("versions", "trained_versions", "latency_versions", "options", "transforms")


class Mirror:
    """One W&B run for each row, and a closing one for the table, all in one group that is called after its folder."""

    def __init__(self, mode: str, folder: Path) -> None:
        self.folder = folder
        self._run: Any = None
        self._wandb: Any = None
        self._urls: list[str] = []
        self._runs_offline = 0
        self._offline_in = folder / "wandb"
        self._complained = False
        environment = os.environ.get("WANDB_MODE", "")
        if mode == "online" and environment in ("offline", "disabled", "dryrun"):
            mode = "offline" if environment == "dryrun" else environment
        if mode not in ("online", "offline", "disabled"):
            raise ValueError(f"wandb has the modes online, offline and disabled, not {mode!r}")
        self.mode = mode
        if mode == "disabled":
            return
        self._wandb = _import_wandb()
        if self._wandb is None:
            self.mode = "disabled"
        elif mode == "online" and not has_key(self._wandb):
            self._go_offline("no key (wandb login)")

    def start(self, name: str, config: Mapping[str, Any], job_type: str) -> None:
        """Open the run of a row; one that is still open was not finished."""
        self.finish()
        if self._wandb is not None:
            self._open(name, dict(config), job_type)
            self._guarded(lambda: self._run.define_metric("*", step_metric="epoch"))

    def epoch(self, record: Mapping[str, Any]) -> None:
        self._guarded(lambda: self._run.log(dict(record)))

    def end(self, row: Mapping[str, Any]) -> None:
        """The row's figures become the run's summary."""

        def write() -> None:
            self._run.config.update({k: row[k] for k in NESTED if k in row}, allow_val_change=True)
            self._run.summary.update({k: v for k, v in row.items() if k not in NESTED})

        self._guarded(write)
        self.finish(exit_code=0)

    def close(self, table: Sequence[Mapping[str, Any]], files: Sequence[Path], packed: Sequence[Path]) -> None:
        """The closing run: table, pictures, and one artifact with the report, the rows and the packed models."""
        if self._wandb is None:
            return
        self.finish()
        held: dict[Path, int] = {}  # and their bytes
        for file in dict.fromkeys([*files, *packed]):
            with suppress(OSError):  # it is not there, or cannot be read
                held[file] = file.stat().st_size
        seconds = UPLOAD_SECONDS + sum(held.values()) / BYTES_A_SECOND
        self._open("table", {"rows": len(table)}, "table", seconds)

        def write_files() -> None:
            name = re.sub(r"[^\w.-]", "-", self.folder.name, flags=re.ASCII)  # a data set's folder may have any
            artifact = self._wandb.Artifact(name, type="table")
            for file in held:
                # "mutable" copies a file: until it is synced, others may have taken its place.
                policy = "mutable" if self.mode == "offline" else "immutable"
                artifact.add_file(str(file), name=str(file.relative_to(self.folder)), policy=policy)
            self._run.log_artifact(artifact)

        def write_table() -> None:
            columns = list(dict.fromkeys(k for row in table for k in row if k not in NESTED))
            data = [[row.get(column) for column in columns] for row in table]
            self._run.log({"rows": self._wandb.Table(columns=columns, data=data)})

        self._guarded(write_files)
        self._guarded(write_table)
        self._guarded(lambda: self._run.log({f.stem: self._wandb.Image(str(f)) for f in files if f.suffix == ".png"}))
        self.finish(exit_code=0)
        self._say_where()

    def finish(self, exit_code: int = 1) -> None:
        """End the run that is open, if any: the next row would be written to it."""

        def end() -> None:
            try:
                self._run.finish(exit_code=exit_code)
            except TimeoutError:
                place = shlex.quote(str(Path(self._run.dir).parent))
                self._go_offline(f"the upload takes too long (to go on with it: wandb sync {place})")

        self._guarded(end)
        self._run = None

    def _open(self, name: str, config: dict[str, Any], job_type: str, upload_seconds: float = UPLOAD_SECONDS) -> None:
        try:
            self._run = self._init(name, config, job_type, upload_seconds)
        except Exception as error:  # wandb raises many kinds, and none is worth a result
            if self.mode == "offline":
                self._complain(error)
            else:
                self._go_offline(f"no connection: {first_line(error)}")
                self._open(name, config, job_type, upload_seconds)
            return
        if self.mode == "offline":
            self._runs_offline += 1
            # In another place than asked for where that can't be written to.
            self._guarded(lambda: setattr(self, "_offline_in", Path(self._run.dir).parent.parent))
        else:
            self._guarded(lambda: self._urls.append(str(self._run.url)))

    def _init(self, name: str, config: dict[str, Any], job_type: str, upload_seconds: float) -> Any:
        wanted = {
            "silent": True, "console": "off", "init_timeout": CONNECT_SECONDS, "finish_timeout": upload_seconds,
            "finish_timeout_raises": True, "summary_timeout": 10, "x_graphql_timeout_seconds": 10,
            "x_graphql_retry_max": 2, "x_file_stream_retry_max": 4, "x_file_transfer_retry_max": 2,
            "x_disable_stats": True,
        }  # fmt: skip
        known = {k: v for k, v in wanted.items() if k in self._wandb.Settings.model_fields}  # they differ by version
        return self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), group=self.folder.name, job_type=job_type, name=name,
            config=config, mode=self.mode, dir=str(self.folder), save_code=False,
            id=secrets.token_hex(4),  # whatever WANDB_RUN_ID says: a row has a run of its own
            settings=self._wandb.Settings(**known),
        )  # fmt: skip

    def _guarded(self, action: Callable[[], Any]) -> None:
        """Do something with the open run, if any; what goes wrong is said."""
        if self._run is None:
            return
        try:
            action()
        except Exception as error:
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            print(f"W&B: {first_line(error)}; the run goes on, its record is rows.jsonl", file=sys.stderr)

    def _go_offline(self, why: str) -> None:
        self.mode = "offline"
        print(f"W&B: {why}, so runs are kept offline", file=sys.stderr)

    def _say_where(self) -> None:
        place = shlex.quote(str(self._offline_in))
        if self._urls:
            say(f"W&B: {self._urls[-1]}")
        if self._runs_offline:
            say(f"W&B, {self._runs_offline} runs offline. View them: wandb leet {place}")
            say(f"                     upload them: wandb sync {place}/offline-run-*")


def has_key(wandb: Any) -> bool:
    """Whether W&B can log in without asking: its environment variables, or an entry for its host in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    given = os.environ.get("WANDB_BASE_URL")
    try:
        server = urlsplit(given or wandb.Settings().base_url)
    except Exception:  # settings that wandb does not understand: it will say so itself
        return False
    # The default server has had two names, and a login under the old one still counts.
    hosts = {server.netloc, server.hostname} | (set() if given else {"api.wandb.ai"})
    named = os.environ.get("NETRC")
    for name in [named] if named else ["~/.netrc", "~/_netrc"]:
        try:
            if hosts & set(netrc.netrc(os.path.expanduser(name)).hosts):
                return True
        except (OSError, ValueError, netrc.NetrcParseError):  # not there, no text, no netrc
            continue
    return False


def _import_wandb() -> Any:
    """The module wandb, or None with one line why not."""
    try:
        import wandb
    except Exception as error:  # not installed, or broken
        print(
            f"W&B: not available ({first_line(error)}), so there is no mirror; rows.jsonl is complete", file=sys.stderr
        )
        return None
    if not hasattr(wandb, "init"):  # an empty namespace: only a folder called wandb was found
        print("W&B: not installed, so there is no mirror; rows.jsonl is complete", file=sys.stderr)
        return None
    return wandb
