"""The mirror: what reaches W&B, and that nothing W&B does stops a run. Offline, but for a closed local port."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from train_test_utils import wandb_mirror
from train_test_utils.logbook import Logbook, read_rows

PNG = (  # of one pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c636000000002000148afa4710000000049454e44ae426082"
)
SCRIPT = f"PNG = {PNG!r}" + """
import sys
from pathlib import Path
from train_test_utils.logbook import Logbook
folder, mode = Path(sys.argv[1]), sys.argv[2]
book = Logbook(folder / "rows.jsonl", wandb_mode=mode)
for name, recipe in (("float", {"epochs": 2}), ("ptq_all", None)):
    book.start_row(f"{name}-seed0", {"model": "resnet_18", "row": {"recipe": recipe}})
    for epoch in (1, 2) if recipe else ():
        book.epoch({"epoch": epoch, "train_loss": 1 / epoch})
    book.row({"row": name, "seed": 0, "test_accuracy_pct": 90.5, "config_hash": name,
              "weight_bits": 32 if recipe else 1.585, "trained_versions": {"torch" if recipe else "numpy": "2"}})
    (folder / f"{name}-seed0").mkdir(exist_ok=True)
    (folder / f"{name}-seed0" / "model.safetensors").write_bytes(b"model of " + name.encode())
(folder / "pixel.png").write_bytes(bytes.fromhex(PNG))
book.close(book.rows(), [folder / "pixel.png"])
book.finish()
print("wandb imported:", "wandb" in sys.modules)
"""


def run_script(folder, mode, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and k != "NETRC"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), mode],
        check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        env=clean | {"HOME": str(folder), "WANDB_ERROR_REPORTING": "false"} | environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [r["row"] for r in read_rows(folder / "rows.jsonl")] == ["float", "ptq_all"]
    return done.stdout, done.stderr


def inspect(run_dir, *options):
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(run_dir)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def test_without_a_key_everything_is_kept_offline(tmp_path):
    pytest.importorskip("wandb")
    out, err = run_script(tmp_path, "online")
    assert err.count("\n") == 1 and "no key" in err
    assert f"wandb leet {tmp_path}/wandb" in out and "wandb sync" in out
    runs = {}
    for run_dir in tmp_path.glob("wandb/offline-run-*"):
        summary = json.loads(inspect(run_dir, "--summary"))
        runs[summary["name"]] = (summary, run_dir)
    assert set(runs) == {"float-seed0", "ptq_all-seed0", "table"}
    trained, folder = runs["float-seed0"]
    assert trained["summary"]["test_accuracy_pct"] == 90.5 and trained["summary"]["train_loss"] == 0.5
    assert trained["config"]["row"] == {"recipe": {"epochs": 2}}
    records = [json.loads(line) for line in inspect(folder).splitlines()]
    text = json.dumps(records)
    assert trained["config"]["trained_versions"] == {"torch": "2"} and "trained_versions" not in trained["summary"]
    assert f'"{tmp_path.name}"' in text and '"train"' in text
    assert sum(record.get("type") == "history" for record in records) == 2
    (axis,) = (record["metric"] for record in records if record["type"] == "metric")
    assert (axis["glob_name"], axis["step_metric"]) == ("*", "epoch")
    table = [json.loads(line) for line in inspect(runs["table"][1]).splitlines()]
    artifacts = {r["artifact"]["type"]: r["artifact"]["manifest"]["contents"] for r in table if r["type"] == "artifact"}
    assert artifacts.keys() == {"table", "run_table"}  # the second is the table that is shown
    files = {file["path"]: Path(file["local_path"]) for file in artifacts["table"]}
    assert files.keys() == {"rows.jsonl", "ptq_all-seed0/model.safetensors", "pixel.png"}  # and no float model
    (tmp_path / "ptq_all-seed0" / "model.safetensors").write_bytes(b"another model")  # before it is synced
    assert files["ptq_all-seed0/model.safetensors"].read_bytes() == b"model of ptq_all"
    assert any("pixel" in json.dumps(record) for record in table if record["type"] == "history")


def test_a_key_without_a_network_goes_offline(tmp_path):
    pytest.importorskip("wandb")
    out, err = run_script(tmp_path, "online", WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert "no connection" in err
    assert "wandb sync" in out and len(list(tmp_path.glob("wandb/offline-run-*"))) == 3


def test_disabled_never_imports_wandb(tmp_path):
    out, err = run_script(tmp_path, "disabled")
    assert "wandb imported: False" in out and err == ""
    assert not (tmp_path / "wandb").exists()


def fill(folder):
    book = Logbook(folder / "rows.jsonl", wandb_mode="offline")
    book.start_row("float-seed0", {"row": {"recipe": None}})
    book.epoch({"epoch": 1})
    book.row({"row": "float"})
    book.close(book.rows(), [])
    book.finish()
    assert [r["row"] for r in read_rows(folder / "rows.jsonl")] == ["float"]


def test_wandb_not_installed_or_only_a_folder_of_that_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)  # import raises
    fill(tmp_path / "a")
    assert capsys.readouterr().err.count("no mirror") == 1
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # an empty namespace
    fill(tmp_path / "b")
    assert capsys.readouterr().err.count("not installed") == 1


class Broken(types.ModuleType):
    """A wandb whose runs raise at everything."""

    Settings = type("Settings", (), {"model_fields": {}})

    def init(self, **settings):
        class Run:
            def __getattr__(self, name):
                raise RuntimeError(f"wandb broke at {name}")

        return Run()


@pytest.mark.parametrize("how, expected", [("finish", [1]), ("start", [1]), ("close", [1, 0]), ("end", [0])])
def test_a_run_whose_row_was_not_finished_is_a_failed_one_and_others_are_not(how, expected, tmp_path, monkeypatch):
    codes = []

    class Working(Broken):
        def init(self, **settings):
            return types.SimpleNamespace(finish=lambda exit_code=0: codes.append(exit_code))

    monkeypatch.setitem(sys.modules, "wandb", Working("wandb"))
    monkeypatch.setenv("WANDB_MODE", "dryrun")  # as offline was called
    monkeypatch.setenv("WANDB_API_KEY", "k")
    mirror = wandb_mirror.Mirror("online", tmp_path)
    mirror.start("float-seed0", {}, "a")
    arguments = {"finish": (), "start": ("ptq_all-seed0", {}, "a"), "close": ([], [], []), "end": ({},)}[how]
    getattr(mirror, how)(*arguments)
    assert mirror.mode == "offline" and codes == expected


class Recording(Broken):
    """A wandb that takes everything and keeps it."""

    def __init__(self, folder):
        super().__init__("wandb")
        self.folder, self.tables, self.patience, self.inits = folder, [], [], []
        self.Table = lambda columns, data: self.tables.append((columns, data))
        self.Settings = lambda finish_timeout=None: self.patience.append(finish_timeout)
        self.Settings.model_fields = {"finish_timeout"}

    def init(self, **settings):
        self.inits.append(settings)
        return types.SimpleNamespace(
            finish=lambda exit_code=0: None, log=lambda record: None, define_metric=lambda *args, **kwargs: None,
            url=f"https://my.host/{settings['name']}", dir=self.folder / "elsewhere" / "run-1" / "files",
        )  # fmt: skip


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_each_run_is_a_new_one_in_the_project_of_the_environment_and_where_they_are_is_said(
    mode, tmp_path, monkeypatch, capsys
):
    wandb = Recording(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for name in ("PROJECT", "RUN_ID", "API_KEY"):
        monkeypatch.setenv(f"WANDB_{name}", "mine")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    mirror = wandb_mirror.Mirror(mode, tmp_path)
    mirror.start("float-seed0", {}, "train")
    (tmp_path / "model.safetensors").touch()
    os.truncate(tmp_path / "model.safetensors", 60 * wandb_mirror.BYTES_A_SECOND)
    mirror.close([{"row": "float", "options": {}}, {"row": "x", "seed": 1}], [], [tmp_path / "model.safetensors"])
    assert [(run["project"], run["group"], run["mode"]) for run in wandb.inits] == [("mine", tmp_path.name, mode)] * 2
    assert len({"mine", *(run["id"] for run in wandb.inits)}) == 3
    assert wandb.tables == [(["row", "seed"], [["float", None], ["x", 1]])]
    of_row, of_table = wandb.patience
    assert of_table == of_row + 60, "packed files have time for their bytes"
    offline = f"2 runs offline. View them: wandb leet {tmp_path}/elsewhere\n"
    assert (offline if mode == "offline" else "https://my.host/table\n") in capsys.readouterr().out


def test_a_table_that_cannot_be_logged_leaves_no_run_open(tmp_path, monkeypatch):
    """Else the next data set's first row would be written to it."""
    codes, names = [], []

    class Working(Broken):
        Table = Image = staticmethod(lambda *args, **kwargs: None)

        def init(self, **settings):
            return types.SimpleNamespace(finish=lambda exit_code=0: codes.append(exit_code), log=lambda record: None)

        def Artifact(self, name, type):
            names.append(name)
            raise ValueError("no artifact today")

    monkeypatch.setitem(sys.modules, "wandb", Working("wandb"))
    mirror = wandb_mirror.Mirror("offline", tmp_path / "resnet_18-my größte images")
    unreadable = tmp_path / ("x" * 300)  # no file system has a name so long: looking for it is an error
    mirror.close([], [unreadable], [unreadable])
    assert names == ["resnet_18-my-gr--te-images"] and codes == [0] and mirror._run is None


@pytest.mark.parametrize("at", ["init", "everything else"])
def test_whatever_wandb_raises_is_said_once(at, tmp_path, monkeypatch, capsys):
    wandb = Broken("wandb")
    if at == "init":
        wandb.init = lambda **settings: 1 / 0
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    fill(tmp_path)
    assert capsys.readouterr().err.count("W&B") == 1


@pytest.mark.parametrize("environment, found", [
    ({}, False), ({"WANDB_API_KEY": "k"}, True), ({"WANDB_IDENTITY_TOKEN_FILE": "f"}, True),
    ({"NETRC": "api.wandb.ai"}, True), ({"NETRC": "elsewhere.org"}, False),
    ({"NETRC": "default.org"}, True), ({"NETRC": "api.wandb.ai", "WANDB_BASE_URL": "https://my.host:8080"}, False),
    ({"NETRC": "my.host", "WANDB_BASE_URL": "https://my.host:8080"}, True),
    ({"NETRC": "my.host:8080", "WANDB_BASE_URL": "https://my.host:8080"}, True),
])  # fmt: skip
def test_where_a_key_is_looked_for(tmp_path, monkeypatch, environment, found):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    if host := environment.get("NETRC"):
        (tmp_path / "netrc").write_text(f"machine {host}\n  login user\n  password key\n")
        environment = environment | {"NETRC": str(tmp_path / "netrc")}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    wandb = types.SimpleNamespace(Settings=lambda: types.SimpleNamespace(base_url="https://default.org"))
    assert wandb_mirror.has_key(wandb) is found


@pytest.mark.parametrize("name", [".netrc", "_netrc"])
def test_a_key_is_looked_for_in_the_home_folder(name, tmp_path, monkeypatch):
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", "WANDB_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / name).write_text("machine api.wandb.ai\n  login user\n  password key\n")
    wandb = types.SimpleNamespace(Settings=lambda: types.SimpleNamespace(base_url="https://api.wandb.ai"))
    assert wandb_mirror.has_key(wandb)


def test_what_wandb_login_writes_is_found(tmp_path, monkeypatch):
    wandb, wbauth = pytest.importorskip("wandb"), pytest.importorskip("wandb.sdk.lib.wbauth.wbnetrc")
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not wandb_mirror.has_key(wandb)
    wbauth.write_netrc_auth(host=wandb.Settings().base_url, api_key="k" * 40)
    assert wandb_mirror.has_key(wandb)


def test_settings_that_wandb_does_not_understand_are_no_key(monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    assert not wandb_mirror.has_key(types.SimpleNamespace(Settings=lambda: 1 / 0))


def test_a_netrc_that_is_no_text_is_no_key(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_bytes(b"machine \xff\n")
    wandb = types.SimpleNamespace(Settings=lambda: types.SimpleNamespace(base_url="https://default.org"))
    assert not wandb_mirror.has_key(wandb)


def test_an_unknown_mode_is_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="not 'on'"):
        Logbook(tmp_path / "rows.jsonl", wandb_mode="on")


def test_an_upload_that_takes_too_long_is_the_last(tmp_path, monkeypatch, capsys):
    """Rows after it are kept offline: each would wait as long."""
    modes = []

    class Slow(Broken):
        def init(self, mode, project, **settings):
            def finish(exit_code=0):
                if mode == "online":
                    raise TimeoutError("Timed out finishing run.")

            modes.append((project, mode))
            return types.SimpleNamespace(finish=finish, define_metric=lambda *args, **kwargs: None, url="my.host",
                                         dir=tmp_path / "wandb" / "run-1" / "files")  # fmt: skip

    monkeypatch.setitem(sys.modules, "wandb", Slow("wandb"))
    monkeypatch.setenv("WANDB_API_KEY", "k")
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    mirror = wandb_mirror.Mirror("online", tmp_path)
    for name in ("float-seed0", "ptq_all-seed0", "qat_all-seed0"):
        mirror.start(name, {}, "train")
        mirror.finish(0)
    assert modes == [("ternary-vision", mode) for mode in ("online", "offline", "offline")]
    assert f"wandb sync {tmp_path}/wandb/run-1)" in capsys.readouterr().err


def test_the_environment_may_disable_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setitem(sys.modules, "wandb", Broken("wandb"))  # would complain if it were touched
    mirror = wandb_mirror.Mirror("online", tmp_path)
    mirror.start("float-seed0", {}, "train")
    mirror.end({"row": "float"})
    assert mirror.mode == "disabled" and list(tmp_path.iterdir()) == []
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mirror.Mirror("disabled", tmp_path).mode == "disabled", "as was asked for"
