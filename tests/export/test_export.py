"""Exports of every kind of run: the merged folder computes what the adapter does, and loads without this package."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from preftune.cli.main import main
from preftune.errors import ConfigError, ModelError, SetupError
from preftune.export import ExportOptions, export
from preftune.models.tuned import find_tuned
from tests.export.conftest import MakeRun

IDS = torch.tensor([[5, 17, 9, 33, 80, 41, 7, 250, 3, 3, 60, 12]])


def adapter_logits(run: Path) -> torch.Tensor:
    from peft import AutoPeftModelForCausalLM

    model: Any = AutoPeftModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def plain_logits(folder: Path, **keywords: Any) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **keywords).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 32},
    "DoRA": {"use_dora": True},
    "head in full": {"modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "all linear": {"target_modules": "all-linear"},
}


@pytest.mark.thin(1)
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_the_adapter_in_fp32(make_run: MakeRun, tmp_path: Path, kind: str) -> None:
    run = make_run(**KINDS[kind])
    done = export(ExportOptions(str(run), output_dir=str(tmp_path / "out"), num_pairs=0))
    assert done.dtype == "float32"
    expected = adapter_logits(run)
    assert float((plain_logits(done.folder) - expected).abs().max()) < 1e-5
    base = find_tuned(run).base
    assert base is not None
    assert float((plain_logits(Path(base)) - expected).abs().max()) > 1e-3, "the adapter does nothing"
    assert not list(done.folder.glob("adapter*"))


def test_tied_embeddings_are_untied_where_the_adapter_changes_one(
    make_run: MakeRun, base: Path, tmp_path: Path
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base / "base")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(base / "base").save_pretrained(tmp_path / "tied")
    for number, target in enumerate((["q_proj"], ["embed_tokens"], ["lm_head"])):
        run = make_run(model=tmp_path / "tied", target_modules=target)
        with warnings.catch_warnings():
            # PEFT warns of such adapters when it loads them.
            warnings.simplefilter("ignore")
            expected = adapter_logits(run)
            done = export(ExportOptions(str(run), output_dir=str(tmp_path / f"out{number}"), num_pairs=0))
        config = json.loads((done.folder / "config.json").read_text(encoding="utf-8"))
        assert config["tie_word_embeddings"] is (target == ["q_proj"])
        assert float((plain_logits(done.folder) - expected).abs().max()) < 1e-5


def test_the_folder_answers_without_this_package(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    done = export(ExportOptions(str(run), output_dir=str(tmp_path / "out"), dtype="bfloat16", num_pairs=0))
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = t.apply_chat_template([{'role': 'user', 'content': 'the film'}], add_generation_prompt=True,"
        " return_tensors='pt', return_dict=True)\n"
        "out = m.generate(**ids, max_new_tokens=5, do_sample=False)\n"
        "assert 'preftune' not in sys.modules; print(m.dtype, out.shape[1] > ids['input_ids'].shape[1],"
        " m.generation_config.eos_token_id)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(done.folder)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert said == ["torch.bfloat16", "True", "2"]


def test_what_is_lost_is_scored_on_the_pairs_that_the_run_held_out(make_run: MakeRun, base: Path) -> None:
    script = {"dataset_name": {"value": str(base / "train.jsonl")}}
    trainer = {"beta": {"value": 0.2}, "max_length": {"value": 256}, "seed": {"value": 1}}
    settings = {"model": {"model_name_or_path": {"value": str(base / "base")}}, "script": script, "trainer": trainer}
    mixture = {"datasets": [{"id": str(base / "train.jsonl")}], "test_split_size": 6}
    script["dataset_mixture"] = {"value": mixture}  # type: ignore[dict-item]
    del script["dataset_name"]
    run = make_run(record={"settings": settings, "data": {"test": {"num_rows": 6}}})
    done = export(ExportOptions(str(run), dtype="bfloat16"))
    assert done.folder == run / "export"
    assert [stage.name for stage in done.stages] == ["adapter", "merged, float32", "saved, bfloat16"]
    assert done.num_pairs == 6
    first, merged, saved = done.stages
    assert first.change is None
    assert merged.largest is not None
    assert saved.largest is not None
    assert saved.change is not None
    assert merged.largest < 1e-5 < saved.largest < 0.1
    assert saved.change["low"] <= saved.change["mean"] <= saved.change["high"]
    record = json.loads((done.folder / "export.json").read_text(encoding="utf-8"))
    assert record["scores"][2]["largest"] == saved.largest
    assert record["accuracy_of"] == "rewards"


def test_losses_agree_with_separate_forwards(make_run: MakeRun, base: Path, tmp_path: Path) -> None:
    run = make_run()
    done = export(
        ExportOptions(
            str(run), output_dir=str(tmp_path / "out"), dtype="float16", dataset_name=str(base / "held.jsonl")
        )
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(run)
    from peft import AutoPeftModelForCausalLM

    models: list[Any] = [
        AutoPeftModelForCausalLM.from_pretrained(run).eval(),
        AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float16).eval(),
    ]
    changes = []
    for line in (base / "held.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for answer in ("chosen", "rejected"):
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)
            whole = tokenizer.apply_chat_template(row["prompt"] + row[answer], return_dict=True)["input_ids"]
            start = len(prompt["input_ids"])
            sums = []
            for model in models:
                with torch.no_grad():
                    logps = model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
                sums.append(sum(float(logps[place - 1, whole[place]]) for place in range(start, len(whole))))
            changes.append((sums[1] - sums[0]) / (len(whole) - start))
    change = done.stages[-1].change
    assert change is not None
    assert change["mean"] == pytest.approx(sum(changes) / len(changes), abs=2e-4)
    assert done.num_pairs == 20


def test_full_weights_are_rounded_and_compared_with_their_base(make_run: MakeRun, base: Path) -> None:
    run = make_run(full=True)
    done = export(ExportOptions(str(run), dtype="float16", dataset_name=str(base / "held.jsonl"), num_pairs=8))
    assert [stage.name for stage in done.stages] == ["trained", "saved, float16"]
    assert done.num_pairs == 8
    assert done.reward == "rewards"
    assert float((plain_logits(done.folder, dtype=torch.float32) - plain_logits(run)).abs().max()) < 0.05


def test_a_run_that_held_nothing_out_says_so(make_run: MakeRun) -> None:
    done = export(ExportOptions(str(make_run())))
    assert not done.stages
    assert any("held no pairs out; name held-out pairs with --dataset_name" in note for note in done.notes)


def test_only_an_earlier_export_is_replaced(make_run: MakeRun, tmp_path: Path) -> None:
    run = make_run()
    options: dict[str, Any] = {"run": str(run), "output_dir": str(tmp_path / "out"), "num_pairs": 0}
    export(ExportOptions(**options))
    with pytest.raises(ConfigError, match=r"there is something already; .*add --overwrite"):
        export(ExportOptions(**options))
    export(ExportOptions(**options, overwrite=True))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="give another --output_dir"):
        export(ExportOptions(str(run), output_dir=str(tmp_path / "mine"), overwrite=True, num_pairs=0))
    assert not list(tmp_path.glob(".*tmp"))


def test_a_failure_leaves_no_half_export(make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()

    def full_disk(*args: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("preftune.export.exporter.save", full_disk)
    assert main(["export", str(run), "--output_dir", str(tmp_path / "out"), "--num_pairs", "0"]) == 6
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--dtype", "int3"], "--dtype: not an allowed value"),
        (["--gguf", "q9"], "--gguf: not a GGUF type"),
        (["--llama_cpp", "x"], "--llama_cpp: has no effect without a GGUF file"),
        (["--gguf", "q8_0", "--llama_cpp", "nowhere"], "--llama_cpp: no converter there"),
        (["--split", "test"], "--split: has no effect alone"),
        (["--qlora_base", "original"], "--qlora_base: the base was not quantised"),
        (["--num_pairs", "-1"], "--num_pairs: out of range"),
    ],
)
def test_wrong_settings_are_one_line(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str], flags: list[str], what: str
) -> None:
    run = make_run()
    capsys.readouterr()
    assert main(["export", str(run), *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"preftune: {what}")
    assert said.count("\n") == 1


def test_a_folder_without_weights_names_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-100").mkdir()
    with pytest.raises(ModelError, match=r"did you mean .*checkpoint-100"):
        find_tuned(tmp_path)
    with pytest.raises(ModelError, match="no such run"):
        find_tuned(tmp_path / "nothing")


def test_a_relative_base_is_found_from_elsewhere(
    make_run: MakeRun, base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = make_run()
    config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "models").symlink_to(base)
    config["base_model_name_or_path"] = "models/base"
    (run / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.chdir("/")
    assert find_tuned(run).base == str(tmp_path.resolve() / "models/base")


def test_the_base_can_be_named(make_run: MakeRun, base: Path, tmp_path: Path) -> None:
    run = make_run()
    config = json.loads((run / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(tmp_path / "moved")
    (run / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError):
        export(ExportOptions(str(run), num_pairs=0))
    export(ExportOptions(str(run), base_model=str(base / "base"), num_pairs=0))


def test_float16_refuses_weights_beyond_it(make_run: MakeRun, base: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base / "base")
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "large")
    AutoTokenizer.from_pretrained(base / "base").save_pretrained(tmp_path / "large")
    run = make_run(model=tmp_path / "large")
    with pytest.raises(ModelError, match="too large for float16"):
        export(ExportOptions(str(run), dtype="float16", num_pairs=0))


def test_the_command_prints_what_follows(
    make_run: MakeRun, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run = make_run()
    held = str(base / "held.jsonl")
    assert main(["export", str(run), "--dtype", "bfloat16", "--dataset_name", held]) == 0
    said = capsys.readouterr().out
    folder = run / "export"
    assert "What was lost, on 20 held-out pairs" in said.replace("\n", " ")
    assert "saved, bfloat16 against adapter:" in said
    assert f"vllm serve {folder} --served-model-name {run.name} --dtype bfloat16" in said
    assert f"ollama create {run.name} -f {folder}/Modelfile" in said
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForCausalLM.from_pretrained" in card
    modelfile = (folder / "Modelfile").read_text(encoding="utf-8")
    assert modelfile.startswith("FROM .\nTEMPLATE")
    assert 'PARAMETER stop "<eos>"' in modelfile


# ---- GGUF ---------------------------------------------------------------------------------------------------------


def test_without_a_converter_the_rest_is_made_and_the_command_said(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    run = make_run()
    with pytest.raises(SetupError, match=r"everything else is in .*convert_hf_to_gguf.py .*--outtype q8_0") as caught:
        export(ExportOptions(str(run), num_pairs=0, gguf="q8_0"))
    assert str(run / "export" / "model-q8_0.gguf") in str(caught.value)
    assert (run / "export" / "model.safetensors").is_file()
    with pytest.raises(SetupError, match=r"llama-quantize .*Q4_K_M"):
        export(ExportOptions(str(run), num_pairs=0, gguf="Q4_K_M", overwrite=True))


def converter(folder: Path, body: str) -> Path:
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text("import sys\nargv = sys.argv\n" + body, encoding="utf-8")
    return folder


def test_a_failing_converter_leaves_the_rest(make_run: MakeRun, tmp_path: Path) -> None:
    broken = converter(tmp_path / "llama", "print('progress')\nsys.exit('Model Foo is not supported')")
    run = make_run()
    with pytest.raises(SetupError, match=r"code 1 \(Model Foo is not supported\)"):
        export(ExportOptions(str(run), num_pairs=0, gguf="f16", llama_cpp=str(broken)))
    assert (run / "export" / "model.safetensors").is_file()
    assert not list((run / "export").glob("*gguf*"))


def test_quantising_goes_through_a_whole_file_that_is_removed(make_run: MakeRun, tmp_path: Path) -> None:
    body = "out = argv[argv.index('--outfile') + 1]\nopen(out, 'w').write(argv[argv.index('--outtype') + 1])"
    folder = converter(tmp_path / "llama", body)
    (folder / "llama-quantize").write_text('#!/bin/sh\n(cat "$1"; echo " $3") > "$2"\n', encoding="utf-8")
    (folder / "llama-quantize").chmod(0o755)
    run = make_run()
    done = export(ExportOptions(str(run), num_pairs=0, dtype="bfloat16", gguf="q4_k_m", llama_cpp=str(folder)))
    assert done.gguf is not None
    assert done.gguf.read_text(encoding="utf-8") == "bf16 Q4_K_M\n"
    assert [path.name for path in done.folder.glob("*gguf*")] == ["model-q4_k_m.gguf"]
    assert (done.folder / "Modelfile").read_text(encoding="utf-8").startswith("FROM ./model-q4_k_m.gguf\n")
    assert any(program == "llama.cpp" for program, _ in done.commands)
