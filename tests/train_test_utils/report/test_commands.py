"""The commands below a table."""

from train_test_utils.report.commands import commands_of


def row(name: str, command: str, seed: int = 0) -> dict[str, object]:
    return {"row": name, "seed": seed, "command": command}


def test_commands_that_differ_in_the_rows_they_choose_are_one():
    commands = [
        "python3 a.py --wandb disabled --budget 0.04 --only float 'ptq*'",
        "python3 a.py --budget 0.04 --only float qat_all --wandb offline",
        "python3 a.py --budget 0.1 --out runs/b --measure-again latency",
        "python3 b.py",
    ]
    assert commands_of([{"command": c} for c in (*commands, commands[0])] + [{}]) == [
        "python3 a.py --budget 0.04 --only float 'ptq*' qat_all",
        "python3 a.py --budget 0.1 --out runs/b",
        "python3 b.py",
    ]


def test_what_was_measured_again_is_named_row_by_row():
    again = [row(name, command="python3 a.py --out b --measure-again") for name in ("float", "ptq_all")]
    assert commands_of(again) == ["python3 a.py --out b --only float ptq_all"]


def test_a_command_names_the_rows_that_it_made_and_the_seeds_that_have_them_all():
    made = [
        row("float", command="python3 a.py --seeds 0 1 --only 'ptq*' qat_all"),  # a parent, which nobody named
        row("ptq_all", command="python3 a.py --seeds 0 1 --only 'ptq*' qat_all"),
        row("ptq_all", command="python3 a.py --only ptq_all --wandb offline"),
        row("ptq_all", seed=1, command="python3 a.py --seeds 0 1 --only 'ptq*' qat_all"),
        row("float", seed=1, command="python3 a.py --seeds 1 --only float"),
        row("qat_all", seed=2, command="python3 a.py --seeds 0 1 2"),
    ]
    assert commands_of(made) == ["python3 a.py --seeds 0 1 --only float 'ptq*'", "python3 a.py --seeds 2"]


def test_the_rows_of_quick_and_others_in_small_batches_take_two_commands():
    made = [
        row("float", command="python3 a.py --quick"),
        row("ptq_all", command="python3 a.py --quick"),
        row("ptq_all_twn", command="python3 a.py --quick --only ptq_all_twn"),
    ]
    assert commands_of(made) == ["python3 a.py --quick", "python3 a.py --quick --only ptq_all_twn"]


def test_commands_keep_quoted_words_launchers_and_the_order_of_seeds():
    command = "torchrun --nproc_per_node=4 x.py --out 'my --dir' --budget=0.1 --seeds {0} --only=qat_all"
    joined = commands_of([row("qat_all", command.format(seed), seed) for seed in (10, 2)])
    assert joined == ["torchrun --nproc_per_node=4 x.py --budget 0.1 --out 'my --dir' --seeds 2 10 --only qat_all"]
