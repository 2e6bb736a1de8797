"""CIFAR in every layout and with every damage, on small stand-ins; downloads from a server on loopback."""

from __future__ import annotations

import hashlib
import http.server
import io
import json
import pickle
import shutil
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from train_test_utils import cifar
from train_test_utils.cifar import SOURCES, Source, load_cifar
from train_test_utils.dataset import Split

TINY = Source("cifar10", "CIFAR10", "someone/cifar10", "label", 10, train_count=20, test_count=10)
PIXELS = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
LABELS = [i % 10 for i in range(30)]


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def write_parquet(
    path: Path, pixels: np.ndarray, labels: list | dict, kind: str = "PNG", metadata: bytes | None = None
) -> None:
    """`labels`: of the column called label, or of several by their names."""
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": encoded(p, kind), "path": None} for p in pixels]
    table = pyarrow.table({"img": cells} | (labels if isinstance(labels, dict) else {"label": labels}))
    parquet.write_table(table.replace_schema_metadata(metadata and {"huggingface": metadata}), path)


def write_hub_layout(folder: Path, kind: str = "PNG") -> None:
    write_parquet(folder / "plain_text" / "train-00000-of-00002.parquet", PIXELS[:10], LABELS[:10], kind)
    write_parquet(folder / "plain_text" / "train-00001-of-00002.parquet", PIXELS[10:20], LABELS[10:20], kind)
    write_parquet(folder / "plain_text" / "test-00000-of-00001.parquet", PIXELS[20:], LABELS[20:], kind)


def expected(which: slice) -> torch.Tensor:
    return torch.from_numpy(PIXELS[which]).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_parquet_as_on_the_hub(tmp_path, kind):
    write_hub_layout(tmp_path / "cifar10", kind)
    data = load_cifar(TINY, tmp_path)
    assert torch.equal(data.train.images, expected(slice(20)))
    assert torch.equal(data.test.images, expected(slice(20, 30)))
    assert data.train.labels.tolist() == LABELS[:20]
    assert len(data.class_names) == 10


def test_cifar100_has_a_hundred_classes_and_not_twenty(tmp_path):
    source = replace(SOURCES["cifar100"], train_digest=None, test_digest=None, train_count=20, test_count=10)
    for which, part in (("train", slice(20)), ("test", slice(20, 30))):
        labels = {"fine_label": [70 + i for i in LABELS[part]], "coarse_label": LABELS[part]}
        write_parquet(tmp_path / "cifar100" / f"{which}-00000-of-00001.parquet", PIXELS[part], labels)
    data = load_cifar(source, tmp_path)
    assert data.test.labels.tolist() == [*range(70, 80)] and len(data.class_names) == 100


def write_torchvision_layout(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The layout of torchvision with two images in each of ten files; its checksums are those of these files."""
    from torchvision import datasets

    def batch(which: slice) -> bytes:
        flat = PIXELS[which].transpose(0, 3, 1, 2).reshape(-1, 3072)
        return pickle.dumps({"data": flat, "labels": LABELS[which]})

    names = [f"data_batch_{i}" for i in range(1, 6)]
    files = {n: batch(slice(4 * i, 4 * i + 4)) for i, n in enumerate(names)} | {"test_batch": batch(slice(20, 30))}
    files["batches.meta"] = pickle.dumps({"label_names": [f"class {i}" for i in range(10)]})
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    sums = {}
    for name, content in files.items():
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[n, sums[n]] for n in names])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]}
    )
    archive = root / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    return archive


@pytest.mark.parametrize("below", ["", "cifar10"])
def test_torchvisions_layout(tmp_path, monkeypatch, below):
    write_torchvision_layout(tmp_path / below, monkeypatch)
    data = load_cifar(TINY, tmp_path)
    assert torch.equal(data.train.images, expected(slice(20))) and data.train.images.is_contiguous()
    assert data.class_names[3] == "class 3"


def test_an_empty_folder_of_torchvisions_layout_is_told_without_torchvisions_advice(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(ValueError, match=r"corrupt \(Dataset not found or corrupted\.\): delete its files there"):
        load_cifar(TINY, tmp_path)


def test_a_damaged_file_in_torchvisions_layout(tmp_path, monkeypatch):
    write_torchvision_layout(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="incomplete or corrupt"):
        load_cifar(TINY, tmp_path)


class Server:
    """A web server on loopback for the files of a folder; `requests` are the paths sent."""

    def __init__(self, folder: Path, answers: dict[str, bytes] | None = None) -> None:
        self.requests: list[str] = []
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:  # the name that http.server calls
                self._answer(True)

            def do_HEAD(self) -> None:
                self._answer(False)

            def _answer(self, with_body: bool) -> None:
                path = self.path.partition("?")[0]
                if with_body:
                    outer.requests.append(path)
                body = (answers or {}).get(path)
                if body is None and (folder / path.lstrip("/")).is_file():
                    body = (folder / path.lstrip("/")).read_bytes()
                self.send_response(404 if body is None else 200)
                self.send_header("Content-Length", str(len(body or b"")))
                self.send_header(
                    "Content-Type", "application/json" if path.startswith("/api/") else "application/octet-stream"
                )
                self.send_header("ETag", '"' + "0" * 40 + '"')
                self.send_header("X-Repo-Commit", "1" * 40)
                self.end_headers()
                if with_body:
                    self.wfile.write(body or b"")

            def log_message(self, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()


def test_download_from_the_authors_server_once(tmp_path, monkeypatch):
    from torchvision import datasets

    write_torchvision_layout(tmp_path / "there", monkeypatch)
    server = Server(tmp_path / "there")
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{server.url}/cifar-10-python.tar.gz")
    assert torch.equal(load_cifar(TINY, tmp_path / "here").train.images, expected(slice(20)))
    assert server.requests
    server.requests.clear()
    load_cifar(TINY, tmp_path / "here")
    assert not server.requests


def test_processes_that_start_together_download_once(tmp_path, monkeypatch):
    from torchvision import datasets

    write_torchvision_layout(tmp_path / "there", monkeypatch)
    server = Server(tmp_path / "there")
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{server.url}/cifar-10-python.tar.gz")
    with ThreadPoolExecutor(3) as pool:  # a lock is of an opened folder, so threads keep it as processes do
        for data in pool.map(lambda _: load_cifar(TINY, tmp_path / "here"), range(3)):
            assert torch.equal(data.train.images, expected(slice(20)))
    assert server.requests.count("/cifar-10-python.tar.gz") == 2, "asked where it is, and fetched, once"
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["cifar-10-batches-py"]


@pytest.mark.parametrize("whole", [True, False])
def test_an_archive_that_lies_there_is_used_if_it_is_whole_and_stays(whole, tmp_path, monkeypatch):
    import huggingface_hub
    from torchvision import datasets

    archive = write_torchvision_layout(tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / "cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    if not whole:
        archive.write_bytes(b"another one")
    before = archive.read_bytes()
    nowhere = partial(huggingface_hub.snapshot_download, endpoint="http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", nowhere)
    with nullcontext() if whole else pytest.raises(FileNotFoundError, match="cannot be downloaded"):
        assert torch.equal(load_cifar(TINY, tmp_path).train.images, expected(slice(20)))
    assert archive.read_bytes() == before


def test_an_interrupted_download_leaves_nothing_that_looks_like_data(tmp_path, monkeypatch):
    from torchvision import datasets

    write_torchvision_layout(tmp_path / "there", monkeypatch)
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{Server(tmp_path / 'there').url}/cifar-10-python.tar.gz")
    with monkeypatch.context() as patched:

        def interrupted(self):
            (Path(self.root) / self.base_folder).mkdir()
            raise KeyboardInterrupt

        patched.setattr(datasets.CIFAR10, "download", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load_cifar(TINY, tmp_path / "here")
    (tmp_path / "here" / ".download-of-a-killed-process").mkdir()
    assert torch.equal(load_cifar(TINY, tmp_path / "here").train.images, expected(slice(20)))
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["cifar-10-batches-py"]


@pytest.mark.parametrize("sent", ["rubbish", "an archive with another file than it should have"])
def test_download_from_the_mirror_when_the_server_sends_something_else(tmp_path, monkeypatch, capsys, sent):
    import huggingface_hub
    from torchvision import datasets

    archive = write_torchvision_layout(tmp_path / "origin", monkeypatch)
    if sent == "rubbish":
        archive.write_bytes(b"an hour later")
    else:
        monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", "0" * 32]])
    write_hub_layout(tmp_path / "hub")
    files = sorted(p.relative_to(tmp_path / "hub").as_posix() for p in (tmp_path / "hub").rglob("*.parquet"))
    info = json.dumps({"id": TINY.mirror, "sha": "1" * 40, "siblings": [{"rfilename": f} for f in files]}).encode()
    tree = json.dumps(
        [{"type": "file", "path": f, "size": (tmp_path / "hub" / f).stat().st_size, "oid": "0" * 40} for f in files]
    ).encode()
    hub = Server(
        tmp_path / "hub",
        {f"/api/datasets/{TINY.mirror}/revision/main": info, f"/api/datasets/{TINY.mirror}/tree/{'1' * 40}": tree}
        | {f"/datasets/{TINY.mirror}/resolve/{'1' * 40}/{f}": (tmp_path / "hub" / f).read_bytes() for f in files},
    )
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{Server(tmp_path / 'origin').url}/cifar-10-python.tar.gz")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", partial(huggingface_hub.snapshot_download, endpoint=hub.url)
    )
    data = load_cifar(TINY, tmp_path / "here")
    assert torch.equal(data.test.images, expected(slice(20, 30)))
    assert "trying the mirror" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["cifar10"], "nothing is left of the first attempt"


def test_no_network_says_where_to_put_the_files(tmp_path, monkeypatch):
    import huggingface_hub
    from torchvision import datasets

    limits: list[float | None] = []
    monkeypatch.setattr("socket.setdefaulttimeout", limits.append)
    monkeypatch.setattr(datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", partial(huggingface_hub.snapshot_download, endpoint="http://127.0.0.1:9")
    )
    with pytest.raises(FileNotFoundError, match="cannot be downloaded.*--data-dir") as raised:
        load_cifar(TINY, tmp_path)
    assert "there, in cifar-10-batches-py/ or as cifar10/*.parquet (" in str(raised.value)
    assert limits == [cifar.SERVER_PATIENCE_SECONDS, None], "the author's server has so long, and the limit goes again"


def test_that_nothing_can_be_downloaded_is_told_with_both_reasons(tmp_path, monkeypatch):
    def failing(reason):
        def fail(*_):
            raise OSError(reason)

        return fail

    monkeypatch.setattr(cifar, "_download_from_author", failing("no route"))
    monkeypatch.setattr(cifar, "_download_from_mirror", failing("no hub"))
    with pytest.raises(FileNotFoundError, match=r"author's server \(no route\) nor from the Hub \(no hub\)"):
        load_cifar(TINY, tmp_path)


def test_the_mirrors_files_go_to_the_sets_folder_where_there_is_one(tmp_path, monkeypatch):
    def snapshot_download(name, local_dir, **_):
        write_hub_layout(local_dir)

    (tmp_path / "cifar10").mkdir()
    monkeypatch.setattr(cifar, "_download_from_author", None)  # which fails
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert torch.equal(load_cifar(TINY, tmp_path).train.images, expected(slice(20)))
    assert [path.name for path in tmp_path.iterdir()] == ["cifar10"]


def test_files_are_read_in_the_order_of_their_names(tmp_path, monkeypatch):
    for i, part in enumerate((slice(5), slice(5, 10), slice(10, 20))):
        write_parquet(tmp_path / "cifar10" / f"train-0000{i}-of-00003.parquet", PIXELS[part], LABELS[part])
    write_parquet(tmp_path / "cifar10" / "test-00000-of-00001.parquet", PIXELS[20:], LABELS[20:])
    found = Path.rglob

    def first_one_last(folder, pattern):
        first, *others = sorted(found(folder, pattern))
        return [*others, first]

    monkeypatch.setattr(Path, "rglob", first_one_last)
    assert torch.equal(load_cifar(TINY, tmp_path).train.images, expected(slice(20)))


def test_files_need_not_be_numbered(tmp_path):
    for which, part in (("train", slice(20)), ("test", slice(20, 30))):
        write_parquet(tmp_path / "cifar10" / f"{which}-all.parquet", PIXELS[part], LABELS[part])
    assert torch.equal(load_cifar(TINY, tmp_path).train.images, expected(slice(20)))


def test_what_is_wrong_with_parquet_files_is_said(tmp_path):
    write_hub_layout(tmp_path / "cifar10")
    folder = tmp_path / "cifar10" / "plain_text"
    with pytest.raises(ValueError, match="20 images instead of 21"):
        load_cifar(replace(TINY, train_count=21), tmp_path)
    with pytest.raises(ValueError, match="test split .* 10 images instead of 11"):
        load_cifar(replace(TINY, test_count=11), tmp_path)
    with pytest.raises(ValueError, match="training images .* are not those of"):
        load_cifar(replace(TINY, train_digest="0" * 64), tmp_path)
    with pytest.raises(ValueError, match="test images .* are not those of"):
        load_cifar(replace(TINY, test_digest="0" * 64), tmp_path)
    second = folder / "train-00001-of-00002.parquet"
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="train-00001-of-00002.parquet cannot be read"):
        load_cifar(TINY, tmp_path)
    second.unlink()
    with pytest.raises(ValueError, match="has 1 of 2 files"):
        load_cifar(TINY, tmp_path)
    write_parquet(second, PIXELS[10:20], [*LABELS[10:19], 10])
    with pytest.raises(ValueError, match="has the label 10; labels go from 0 to 9"):
        load_cifar(TINY, tmp_path)
    write_parquet(second, np.zeros((10, 32, 31, 3), np.uint8), LABELS[10:20])
    with pytest.raises(ValueError, match="31×32 pixels instead of 32×32"):
        load_cifar(TINY, tmp_path)
    (folder / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="no test-"):
        load_cifar(TINY, tmp_path)


@pytest.mark.parametrize(
    "labels, said",
    [
        ([-1] * 10, "has the label -1; labels go from 0 to 9, in .*: delete its files"),
        ([300] * 10, "has the label 300; labels go from 0 to 9, in .*: delete its files"),
        ([None] * 9 + [1], r"cannot be read \(an image has no label\): delete its files"),
        ([0.5] * 10, "cannot be read .*: delete its files"),
        (["cat"] * 10, "cannot be read .*: delete its files"),
    ],
)
def test_labels_that_are_none(labels, said, tmp_path):
    write_hub_layout(tmp_path / "cifar10")
    write_parquet(tmp_path / "cifar10" / "plain_text" / "train-00001-of-00002.parquet", PIXELS[:10], labels)
    with pytest.raises(ValueError, match=said):
        load_cifar(replace(TINY, train_digest="0" * 64), tmp_path)


@pytest.mark.parametrize("kept", [0, 3, 1000, -1])
def test_a_first_file_that_is_cut_short_is_named(kept, tmp_path):
    write_hub_layout(tmp_path / "cifar10")
    path = tmp_path / "cifar10" / "plain_text" / "train-00000-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{path.name} cannot be read .*: delete its files"):
        load_cifar(TINY, tmp_path)


@pytest.mark.parametrize(
    "names, taken", [([f"class {i}" for i in range(10)], "class 3"), (["a", "b"], "3"), (5, "3"), (None, "3")]
)
def test_class_names_are_those_of_the_metadata_if_it_has_them(names, taken, tmp_path):
    write_hub_layout(tmp_path / "cifar10")
    metadata = json.dumps({"info": {"features": {"label": {"names": names}}}} if names else [1]).encode()
    path = tmp_path / "cifar10" / "plain_text" / "train-00000-of-00002.parquet"
    write_parquet(path, PIXELS[:10], LABELS[:10], metadata=metadata)
    assert load_cifar(TINY, tmp_path).class_names[3] == taken


def test_images_of_one_channel_are_grey(tmp_path):
    write_hub_layout(tmp_path / "cifar10")
    path = tmp_path / "cifar10" / "plain_text" / "test-00000-of-00001.parquet"
    write_parquet(path, PIXELS[20:, :, :, 0], LABELS[20:])
    grey = load_cifar(TINY, tmp_path).test.images
    assert torch.equal(grey, expected(slice(20, 30))[:, :1].expand_as(grey))


def test_the_digest_is_the_one_that_the_known_sums_were_made_with():
    images = expected(slice(30))
    pairs = [bytes([label]) + image.numpy().tobytes() for label, image in zip(LABELS, images, strict=True)]
    total = sum(int(hashlib.sha256(pair).hexdigest(), 16) for pair in pairs)
    assert cifar.digest(Split(images, torch.tensor(LABELS))) == f"{total:064x}"[-64:]


def test_the_digest_forgets_order_but_not_which_label_an_image_has():
    split = Split(expected(slice(20)).contiguous(), torch.tensor(LABELS[:20]))
    turned = split[torch.arange(19, -1, -1)]
    assert cifar.digest(turned) == cifar.digest(split)
    assert cifar.digest(Split(split.images, turned.labels)) != cifar.digest(split)
