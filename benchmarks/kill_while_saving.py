"""Kills while saving, and saves on a full disk: the file that was there before has to stay whole.

    python3 benchmarks/kill_while_saving.py --kills 500 --full 100

A child process saves two versions of a model to one path in turn, without pause; it gets SIGKILL at a random moment,
and the path then has to hold one of the two versions, byte for byte. For the full disk, a file system with too little
room left (a small tmpfs where one may be mounted, else a limit on the size of files) takes a save on top of a good
file; that has to raise OSError with the good file as it was and no temporary file left.
Appends to results/files/kills.jsonl.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.command_line import count, make_parser
from quantization_utils.network import PackedNetwork
from quantization_utils.nodes import IMAGE, Node
from quantization_utils.storage import load_model, save_model
from train_test_utils.record import append_record


def version_of_model(seed: int, width: int) -> PackedNetwork:
    """A packed network with random codes, `width` wide: a convolution over the whole image, two linear layers."""
    generator = torch.Generator().manual_seed(seed)

    def node(op: str, source: int, shape: tuple[int, ...], out_max: int | None) -> Node:
        codes = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
        return Node(op, source, codes=codes, gain=torch.full(shape[:1], 1e-3), bias=torch.zeros(shape[0]),
                    kernel=shape[2:] or (1, 1), relu=out_max is not None, out_max=out_max)  # fmt: skip

    first = node("conv", IMAGE, (width, 3, 32, 32), 255)
    return PackedNetwork([first, node("linear", 0, (width, width), 255), node("linear", 1, (10, width), None)])


def kill_while_saving(kills: int, folder: Path, width: int) -> dict[str, Any]:
    """Counts: which version was found after a kill, how often the kill fell between the start and the end of a save."""
    rng, path = random.Random(0), folder / "model.safetensors"
    contents, seconds = [], 0.0
    models = [version_of_model(s, width) for s in (1, 2)]
    for model in models:
        start = time.perf_counter()
        save_model(model, path)
        seconds = time.perf_counter() - start
        contents.append(path.read_bytes())
    figures = {"kills": kills, "file_bytes": len(contents[0])}
    figures |= dict.fromkeys(("first", "second", "broken", "mid_save", "leftovers"), 0)
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                while True:
                    for model in models:
                        save_model(model, path)
            os._exit(1)
        time.sleep(rng.uniform(0.2, 3) * seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the saving process ended by itself"
        found = path.read_bytes()
        load_model(path)
        figures["first" if found == contents[0] else "second" if found == contents[1] else "broken"] += 1
        figures["mid_save"] += bool(_temporaries(folder))
    save_model(models[0], path)  # a save removes what killed ones left
    figures["leftovers"] = len(_temporaries(folder))
    return figures


def _temporaries(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if p.name.endswith(".tmp")]


def save_on_full_disk(saves: int, folder: Path, width: int, mounted: bool) -> dict[str, Any]:
    """Counts of saves that were refused in a sentence, and of what they left."""
    rng, path = random.Random(0), folder / "model.safetensors"
    old, new = version_of_model(1, width), version_of_model(2, width)
    size = save_model(old, path)
    content = path.read_bytes()
    figures: dict[str, Any] = {"saves": saves, "file_bytes": size, "refused": 0, "intact": 0, "leftovers": 0,
                               "how": "full tmpfs" if mounted else "RLIMIT_FSIZE"}  # fmt: skip
    for _ in range(saves):
        room = rng.choice([0, rng.randrange(size)])
        with _little_room(folder, room, mounted):
            try:
                save_model(new, path)
            except OSError as error:
                figures["refused"] += "unchanged" in str(error)
                figures["sentence"] = str(error).replace(str(folder), "FOLDER")
        load_model(path)
        figures["intact"] += path.read_bytes() == content
        figures["leftovers"] += len(_temporaries(folder))
    return figures


@contextlib.contextmanager
def _little_room(folder: Path, room: int, mounted: bool) -> Iterator[None]:
    if not mounted:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (max(room, 1), hard))  # Python turns the signal into an OSError
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return
    filler, status = folder / "filler", os.statvfs(folder)
    with open(filler, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, status.f_bavail * status.f_frsize - room))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def small_file_system(megabytes: int) -> Iterator[tuple[Path, bool]]:
    """(folder, whether it is a small tmpfs of its own)."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
        mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
        try:
            yield Path(folder), mounted
        finally:
            if mounted:
                subprocess.run(["umount", folder], check=True)


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=count, default=500)
    parser.add_argument("--full", type=count, default=100, help="saves on a full disk")
    parser.add_argument("--width", type=count, default=3072, help="of the model: width² weights and more")
    options = parser.parse_args()
    torch.set_num_threads(1)  # forked children must not wait for threads that stayed in the parent
    with tempfile.TemporaryDirectory(dir=Path(__file__).resolve().parent) as folder:  # on a disk, if the project is
        killed = kill_while_saving(options.kills, Path(folder), options.width)
    print(f"{killed['kills']} kills while saving {killed['file_bytes'] / 1e6:.1f} MB: {killed['mid_save']} in the "
          "middle of a save; "
          f"found the first version {killed['first']} times, the second {killed['second']}, broken "
          f"{killed['broken']}")  # fmt: skip
    with small_file_system(32) as (folder, mounted):
        full = save_on_full_disk(options.full, folder, options.width, mounted)
    print(f"{full['saves']} saves on a full disk ({full['how']}): {full['refused']} refused in a sentence, "
          f"previous file intact {full['intact']} times, {full['leftovers']} temporary files left")  # fmt: skip
    print(f"    {full.get('sentence')}")
    append_record("files/kills", {"killed": killed, "full": full})
    good = killed["broken"] == 0 and killed["leftovers"] == 0 and full["leftovers"] == 0
    return 0 if good and full["refused"] == full["intact"] == full["saves"] else 1


if __name__ == "__main__":
    sys.exit(main())
