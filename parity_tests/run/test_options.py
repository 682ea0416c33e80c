"""Settings: presets, precedence, refusals, and the settings file of a run."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies

from torch_ref.spec.config import PRESETS, ComputeConfig, ModelConfig
from torch_ref.spec.huggingface import export_folder
from torch_ref.spec.interface import OptimizerConfig, Sampling, TrainingState, UserError
from torch_ref.spec.parameters import initial_values
from train.command_line import field_docstrings, parse, settings_table
from train.data.hub import DEFAULT_CONFIGS
from train.data.options import Dataset
from train.run.options import DeviceOptions, Options, flag, trajectory_differences
from train.run.schedule import Schedule
from train.state.neutral import write_state

PROMISED = (
    "--preset --config --run-dir --seed --device --dtype --dataset --dataset-config --tokenizer --steps "
    "--extended-steps --batch-size --micro-batch-size --seq-len --learning-rate --warmup-steps --weight-decay "
    "--grad-clip --checkpoint-interval --sample-interval --eval-interval --keep-checkpoints"
).split()


def read(*argv: str) -> Options:
    return parse(argv, "prog")


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as error:
        read(*argv)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_default_is_the_full_run() -> None:
    options = read()
    assert options == Options() == read("--preset", "smol-774m")
    assert options.model == PRESETS["smol-774m"]
    assert (options.steps, options.extended_steps, options.batch_size, options.seq_len) == (10_000, 100, 8, 2048)
    assert (options.learning_rate, options.warmup_steps, options.weight_decay, options.grad_clip) == (
        0.003,
        500,
        0.01,
        1.0,
    )
    assert (options.beta1, options.beta2) == (0.9, 0.95)
    assert (options.checkpoint_interval, options.eval_interval, options.sample_interval) == (1000, 500, 500)
    assert (options.micro_batch_size, options.keep_checkpoints, options.patience) == ("auto", 0, 0)
    assert options.dataset == ("HuggingFaceTB/smollm-corpus",)
    assert DEFAULT_CONFIGS[options.dataset[0]] == "cosmopedia-v2"
    assert options.data.tokenizer == "HuggingFaceTB/cosmo2-tokenizer"


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_name_their_model(preset: str) -> None:
    options = read("--preset", preset)
    assert options.preset == preset and options.model == PRESETS[preset]


def test_another_hub_dataset_has_no_configuration_of_its_own() -> None:
    assert read("--dataset", "some/corpus").data.datasets()[0].config is None
    assert read("--dataset", "some/corpus", "--dataset-config", "en").data.datasets()[0].config == "en"


def test_what_is_repeated_takes_the_place_of_what_is_below(tmp_path: Path) -> None:
    (tmp_path / "one.toml").write_text('dataset = "a"\nvalidation_dataset = "n=x"\ndataset_weights = 2')
    (tmp_path / "two.toml").write_text('dataset = ["a", "b"]\ndataset_weights = [1, 2.5]\ntext_field = ["t", "u"]')
    one, two = (read("--config", str(tmp_path / f"{name}.toml")) for name in ("one", "two"))
    assert (one.dataset, one.validation_dataset, one.dataset_weights) == (("a",), ("n=x",), (2.0,))
    assert two.data.datasets() == [Dataset("a", None, None, "t", 1.0), Dataset("b", None, None, "u", 2.5)]
    (tmp_path / "again.toml").write_text(two.to_toml())
    assert read("--config", str(tmp_path / "again.toml")) == dataclasses.replace(two, config=tmp_path / "again.toml")
    over = read("--config", str(tmp_path / "two.toml"), "--dataset", "c", "--dataset=d", "--text-field", "v")
    assert (over.dataset, over.text_field) == (("c", "d"), ("v",))
    (tmp_path / "wrong.toml").write_text('dataset = ["a", 2]')
    with pytest.raises(UserError, match="dataset = "):
        read("--config", str(tmp_path / "wrong.toml"))


def test_precedence(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('preset = "tiny"\nsteps = 70\nlearning_rate = 1\n[model]\nnum_layers = 3\n')
    tiny = read("--preset", "tiny")
    options = read("--config", str(file), "--steps", "90", "--num-heads", "2")
    assert options.preset == "tiny" and options.dataset == ("python-docs",)
    assert (tiny.steps, options.steps) != (70, 70) and options.steps == 90  # flag over file
    assert options.learning_rate == 1.0 and isinstance(options.learning_rate, float)  # file over preset
    assert options.warmup_steps == tiny.warmup_steps  # preset over default
    assert options.model == dataclasses.replace(tiny.model, num_layers=3, num_heads=2)
    assert read("--config", str(file), "--preset", "small").preset == "small"


def test_model_presets_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('\ufeff[model]\npreset = "small"\nfirst_k_dense = 1\n', encoding="utf-8")  # as some editors begin
    assert read("--config", str(file)).model == dataclasses.replace(PRESETS["small"], first_k_dense=1)


@pytest.mark.parametrize(
    ("toml", "named"),
    [
        ("stepz = 3", "unknown setting 'stepz', did you mean steps?"),
        ('steps = "3"', 'steps = "3": must be int'),
        ("steps = true", "steps = true: must be int"),
        ('dtype = "float16"', 'dtype = "float16": must be "auto" or "float32" or "bfloat16" or "float64"'),
        ('loss_chunk = "all"', 'loss_chunk = "all": must be int or "auto"'),
        ("dataset = 3", "dataset = 3: must be str or a list of them"),
        ("[model]\nlayers = 3", "[model]: unknown setting 'layers'"),
        ("[model]\nnum_heads = 7", "num_kv_heads"),
        ('[model]\npreset = "huge"', "there are tiny, small,"),
        ("model = 3", "must be a table"),
        ("steps = ", "not TOML"),
        ('config = "other.toml"', "config: a file of settings cannot name another"),
        ("init_from = 3", "init_from = 3: must be Path"),
    ],
)
def test_a_file_is_refused_by_name(tmp_path: Path, toml: str, named: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(toml)
    message = refusal("--config", str(file))
    assert named in message and str(file) in message


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--stepz", "3"], "unknown option --stepz, did you mean --steps?"),
        (["--step", "3"], "unknown option --step"),
        (["--steps", "many"], "--steps: invalid literal for int()"),
        (["--steps"], "'--steps'"),
        (["--preset", "tiny", "--config"], "'--config'"),
        (["--init-from"], "'--init-from'"),
        (["--preset"], "'--preset'"),
        (["--device", "tpu"], "invalid choice 'tpu' for argument '--device'"),
        (["--preset", "large"], "--preset large: there are small, smol-774m,"),
        (["--config", "absent.toml"], "--config absent.toml: No such file"),
        (["--steps", "0"], "--steps 0: must be at least 1"),
        (["--tokens", "many"], "--tokens many: must be a number such as 200M"),
        (["--tokens", "0"], "--tokens 0: must be at least 1"),
        (["--tokens", "9" * 310], "9: must be below 1e308"),
        (["--tokens", "9" * 300 + "T"], "9T: must be below 1e308"),
        (["--decay-steps", "9"], "--decay-steps 9: only --lr-schedule wsd"),
        (["--lr-schedule", "wsd", "--decay-steps", "20000"], "--decay-steps 20000: must be from 1 to --steps 10000"),
        (["--profile-steps", "23-20"], "--profile-steps 23-20: must be FIRST-LAST, such as 20-23, from 1 to 10100"),
        (["--profile-steps", "0-2"], "--profile-steps 0-2: must be FIRST-LAST"),
        (["--profile-steps", "9-10101"], "--profile-steps 9-10101: must be FIRST-LAST"),
        (["--profile-steps", "some"], "--profile-steps some: must be FIRST-LAST"),
        (["--max-minutes", "-1"], "--max-minutes -1.0: must be a number of minutes"),
        (["--checkpoint-minutes", "nan"], "--checkpoint-minutes nan: must be a number of minutes"),
        (["--extended-steps", "-1"], "--extended-steps -1: must not be negative"),
        (["--learning-rate", "nan"], "--learning-rate nan: must be a number above 0"),
        (["--temperature", "1e-9"], "--temperature 1e-09: must be a number from 1e-06 on"),
        (["--learning-rate", "inf"], "--learning-rate inf"),
        (["--grad-clip", "0"], "--grad-clip 0.0"),
        (["--beta2", "1"], "--beta2 1.0: must be at least 0 and below 1"),
        (["--top-p", "1.5"], "--top-p 1.5"),
        (
            ["--batch-size", "6", "--micro-batch-size", "4"],
            "--batch-size 6: must be a multiple of --micro-batch-size 4",
        ),
        (
            ["--seq-len", "1", "--max-position", "1"],
            "--sample-interval 500: --max-position 1 has no room for a prompt and a token; give 0",
        ),
        (["--seq-len", "4096"], "--seq-len 4096: must be at most --max-position 2048"),
        (["--patience", "3", "--eval-interval", "0"], "--patience 3: needs validation"),
        (["--patience", "3", "--validation-fraction", "0"], "--patience 3: needs validation"),
        (["--validation-fraction", "1.5"], "--validation-fraction 1.5: must be from 0 to 1"),
        (["--dataset", "a", "--dataset", "b", "--dataset-weights", "1"], "--dataset-weights: 1 for 2 --dataset"),
        (["--dataset-weights", "0"], "--dataset-weights 0.0: each must be a number above 0"),
        (["--text-field", "a", "--text-field", "b"], "--text-field: 2 for 1 --dataset"),
        (["--validation-dataset", "a/b=c"], "--validation-dataset a/b=c: must be NAME=FILES"),
        (["--validation-dataset", "held-out=c"], "--validation-dataset held-out=c: must be NAME=FILES"),
        (
            ["--validation-dataset", "a=b", "--validation-dataset", "a=c"],
            "--validation-dataset a=c: must be NAME=FILES",
        ),
        (["--document-bytes", "10"], "--document-bytes 10: must be 0 or from 256"),
        (["--prompt", ""], "--prompt : must not be empty"),
        (["--mesh", "fsdp=0"], "--mesh fsdp=0: 'fsdp=0' is none of data=N, fsdp=N, expert=N with N from 1"),
        (["--mesh", "data=1,pipe=2"], "--mesh data=1,pipe=2: 'pipe=2' is none of data=N"),
        (["--mesh", "data=2,data=4"], "--mesh data=2,data=4: data has two sizes"),
        (
            ["--mesh", "expert=3", "--batch-size", "9"],
            "--mesh expert=3: expert must be a divisor of --n-routed-experts 8",
        ),
        (["--first-k-dense", "31"], "first_k_dense = 31: must be at most 30"),
        (["--num-kv-heads", "2"], "num_kv_heads = 2: must divide num_heads = 9"),
        (["extra"], "unknown option extra"),
    ],
)
def test_impossible_flags_are_refused_by_name(argv: list[str], named: str) -> None:
    assert named in refusal(*argv)


@pytest.mark.parametrize(
    ("tokens", "steps"), [("1M", 62), ("16384", 1), ("16385", 2), ("0.5m", 31), ("2_000_000", 123)]
)
def test_a_token_budget_is_the_length_of_the_main_phase(tokens: str, steps: int) -> None:
    options = read("--tokens", tokens, "--warmup-steps", "1")
    assert options.batch_size * options.seq_len == 16384
    assert options.steps == steps and options.tokens is None


def test_a_token_budget_in_a_file_gives_way_to_steps(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text('tokens = "1M"')
    assert read("--config", str(file)).steps == 62
    assert read("--config", str(file), "--steps", "7").steps == 7
    file.write_text("tokens = 32768")
    assert read("--config", str(file)).steps == 2
    assert "give one of them" in refusal("--tokens", "1M", "--steps", "7")


def test_the_automatic_decay_is_a_fifth_of_the_main_phase_rounded_up() -> None:
    assert [Options(steps=steps, lr_schedule="wsd").stable_steps for steps in (1000, 1001)] == [800, 800]
    assert Options(steps=600, lr_schedule="wsd").stable_steps == 500, "it does not begin before the warm-up has ended"


def test_every_flag_of_the_update_the_samples_and_the_computation_arrives() -> None:
    options = read(
        *"--steps 90 --learning-rate 0.02 --warmup-steps 7 --lr-schedule wsd --decay-steps 30".split(),
        *"--final-lr-ratio 0.3 --beta1 0.8 --beta2 0.85 --eps 1e-6 --weight-decay 0.05 --grad-clip 2.5".split(),
        *"--batch-size 24 --micro-batch-size 2 --mesh data=3,fsdp=2,expert=2 --n-routed-experts 8".split(),
        *"--dtype bfloat16 --attention plain --moe dense --remat layers --no-scan-layers --compile off".split(),
        *"--loss-chunk 64 --sample-tokens 11 --temperature 0.6 --top-k 5 --top-p 0.7".split(),
    )
    schedule = Schedule(peak=0.02, warmup_steps=7, steps=90, final_ratio=0.3, decay_steps=30)
    assert options.schedule == schedule
    assert options.optimizer == OptimizerConfig(
        schedule=schedule, betas=(0.8, 0.85), eps=1e-6, weight_decay=0.05, grad_clip=2.5, micro_batch_size=2
    )
    assert options.compute == ComputeConfig(
        dtype="bfloat16",
        attention="plain",
        moe="dense",
        remat="layers",
        scan_layers=False,
        loss_chunk=64,
        mesh=(3, 2, 2),
        compile="off",
    )
    assert options.sampling(9) == Sampling(max_new_tokens=11, temperature=0.6, top_k=5, top_p=0.7, stop_token=9)


def test_a_batch_may_be_smaller_than_a_micro_batch() -> None:
    options = read("--micro-batch-size", "8", "--batch-size", "2")
    assert (options.rows_per_pass, options.micro_batches, options.optimizer.micro_batch_size) == (2, 1, 2)
    assert read("--batch-size", "12", "--micro-batch-size", "4").micro_batches == 3


@pytest.mark.parametrize("argv", [[], ["--preset", "tiny"], ["--eps", "1e-09", "--prompt", 'He said "hm\\n"']])
def test_the_settings_file_reads_back(tmp_path: Path, argv: list[str]) -> None:
    options = read(*argv, "--run-dir", "somewhere", "--find-lr", "--max-minutes", "55")
    file = tmp_path / "settings.toml"
    file.write_text(options.to_toml())
    # What belongs to one start of a run is not in it.
    of_one_start = {"run_dir": None, "find_lr": False, "max_minutes": 0.0}
    assert read("--config", str(file)) == dataclasses.replace(options, **of_one_start, config=file)


def test_flags_are_flat_the_same_everywhere_and_kept(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        read("--help")
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    for name in [field.name for cls in (Options, ModelConfig) for field in dataclasses.fields(cls)]:
        if name != "model":
            assert flag(name) in shown
    for promised in PROMISED:
        assert f"{promised} " in shown


def test_every_setting_is_explained() -> None:
    rows = [line.split("|") for line in settings_table().splitlines() if line.startswith("| `--")]
    fields = {flag(field.name) for cls in (Options, ModelConfig) for field in dataclasses.fields(cls)} - {"--model"}
    assert {cells[1].strip(" `*") for cells in rows} == fields
    for cells in rows:
        assert cells[3].strip().endswith("."), cells
    table = settings_table()
    assert "| `--learning-rate` * | `0.003` |" in table and "| `--device` | `auto` |" in table


@pytest.mark.parametrize("package", ["flax_model", "torch_ref"])
def test_the_help_names_every_path(package: str) -> None:
    pytest.importorskip({"flax_model": "jax", "torch_ref": "torch"}[package])
    described = field_docstrings(DeviceOptions)
    for setting, module in (("attention", "attention"), ("moe", "moe")):
        paths = {"attention": "ATTENTION_PATHS", "moe": "EXPERT_PATHS"}[setting]
        for path in getattr(importlib.import_module(f"{package}.{module}"), paths):
            assert re.search(rf"\b{path}\b", described[setting]), path


def test_the_docs_have_the_current_table() -> None:
    assert settings_table() in (Path(__file__).parents[2] / "docs/settings.md").read_text(encoding="utf-8")


def test_trajectory_differences() -> None:
    now = Options()
    assert trajectory_differences(now.to_dict(), now.to_dict()) == []
    harmless = dataclasses.replace(now, device="cpu", eval_interval=7, prompt="Hm", patience=3)
    assert trajectory_differences(now.to_dict(), harmless.to_dict()) == []
    other = dataclasses.replace(now, seed=1, model=PRESETS["tiny"], seq_len=256)
    found = trajectory_differences(now.to_dict(), other.to_dict())
    assert "--seed was 0, now 1" in found and "--seq-len was 2048, now 256" in found
    assert "--num-layers was 30, now 4" in found and "--rope-theta" not in " ".join(found)


def test_settings_need_no_framework_and_nothing_to_draw_with() -> None:
    code = (
        "import sys, train.run.launch, train.plot, train.runs, train.flax_main, torch_ref.train\n"
        "from train.command_line import parse; parse(['--preset', 'tiny'], 'prog')\n"
        "assert not {'torch', 'jax', 'flax', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


TEXT = strategies.text(strategies.characters(exclude_categories=["Cs"]), min_size=1)  # lone surrogates are no text
NUMBER = strategies.floats(1e-9, 0.99)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt=TEXT, dataset=TEXT, tokenizer=TEXT, text_field=TEXT, project=TEXT, rate=NUMBER, beta=NUMBER)
@example("\U0001f600", "a\\b", '"quoted"', "line\nbreak\r\t", "\x7f\x00", 1e-9, 0.5)
def test_any_setting_survives_the_settings_file(tmp_path, prompt, dataset, tokenizer, text_field, project, rate, beta):
    options = Options(
        prompt=prompt,
        dataset=(dataset,),
        tokenizer=tokenizer,
        text_field=(text_field,),
        wandb_project=project,
        learning_rate=rate,
        beta1=beta,
    )
    file = tmp_path / "settings.toml"
    file.write_text(options.to_toml(), encoding="utf-8", newline="")
    back = read("--config", str(file))
    assert dataclasses.replace(back, config=None) == options


@pytest.mark.parametrize("spelling", ["--init-from {}", "--init_from {}", "--init-from={}", "--init_from={}"])
def test_every_spelling_of_a_flag_is_the_same_flag(tmp_path: Path, spelling: str) -> None:
    folder = tmp_path / "exported_model"
    config = dataclasses.replace(PRESETS["tiny"], num_layers=2, vocab_size=300)
    export_folder(folder, config, initial_values(config, 0))
    (folder / "tokenizer.json").write_text("{}")
    options = read("--seq-len", "64", *spelling.format(folder).split())
    assert (options.init_from, options.model, options.tokenizer) == (folder, config, str(folder))


def test_where_a_run_starts_may_stand_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    folder, config = tmp_path / "exported", dataclasses.replace(PRESETS["tiny"], num_layers=2, vocab_size=300)
    export_folder(folder, config, initial_values(config, 0))
    (folder / "tokenizer.json").write_text("{}")
    file = tmp_path / "mine.toml"
    file.write_text('init_from = "~/exported"\nseq_len = 64\n')
    options = read("--config", str(file))
    assert (options.init_from, options.model, options.tokenizer) == (folder, config, str(folder))

    stored = dataclasses.replace(options, learning_rate=0.5, tokenizer="bpe", max_minutes=55.0).to_dict()
    weights = {row.name: value for row, value in initial_values(config, 0)}
    for number in (1, 2):
        meta = {"options": stored | {"seed": number}}
        write_state(tmp_path / f"state {number}", TrainingState(config, weights, meta=meta))
    file.write_text('resume_from = "~/state 1"\nwarmup_steps = 7\n')
    options = read("--config", str(file))
    assert (options.resume_from, options.seed, options.model) == (tmp_path / "state 1", 1, config)
    assert (options.learning_rate, options.tokenizer, options.warmup_steps) == (0.5, "bpe", 7)
    assert options.max_minutes == 0, "the limit of another run's start"
    options = read("--config", str(file), "--resume-from", str(tmp_path / "state 2"))
    assert (options.resume_from, options.seed) == (tmp_path / "state 2", 2)
    # Its learning rate goes on: a sweep would come to nothing, and unsaid.
    assert "--find-lr: a run that goes on by --resume-from keeps" in refusal("--config", str(file), "--find-lr")
