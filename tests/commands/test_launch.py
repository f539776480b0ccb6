"""`puna launch`: what it hands to torchrun, and manifests that start the same."""

import subprocess
import sys

import pytest
import yaml

from launching import SECONDS
from puna.cli import main
from puna.cluster.torchrun import torchrun_arguments
from puna.commands.launch import LaunchOptions, manifest
from puna.options import parse

RUN = ["train", "run.yaml", "--mesh.tp", "2"]


def options(*words):
    return parse("launch", LaunchOptions, [*words, *RUN])


def test_one_machine_needs_no_rendezvous():
    assert torchrun_arguments(RUN, nproc=4) == ["--nproc-per-node=4", "--standalone", "-m", "puna", *RUN]


def test_several_machines_meet_at_the_first():
    found = torchrun_arguments(RUN, nproc=8, nnodes=2, rendezvous="a:1")
    assert found[:4] == ["--nproc-per-node=8", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=a:1"]


def test_the_slurm_script_is_a_script():
    script = manifest(options("--slurm", "--nproc", "8", "--nnodes", "4", "--name", "big", "--time", "1:00:00"))
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    for line in ("--nodes=4", "--gpus-per-node=8", "--job-name=big", "--time=1:00:00", "--signal=TERM@120"):
        assert f"#SBATCH {line}\n" in script
    assert script.splitlines()[-1].startswith("srun torchrun --nproc-per-node=8 --nnodes=4 --rdzv-backend=c10d")
    assert '--rdzv-endpoint="$head:29500"' in script and script.endswith("-m puna train run.yaml --mesh.tp 2")
    assert "--gpus-per-node" not in manifest(options("--slurm", "--no-gpus"))


def test_the_kubernetes_manifest_is_a_service_and_a_job():
    words = ("--k8s", "--nproc", "8", "--nnodes", "4", "--image", "me/puna:1")
    service, job = yaml.safe_load_all(manifest(options(*words)))
    assert (service["kind"], job["kind"], job["spec"]["completions"]) == ("Service", "Job", 4)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert container["command"][:3] == ["torchrun", "--nproc-per-node=8", "--nnodes=4"]
    assert "--rdzv-endpoint=puna-0.puna:29500" in container["command"] and container["command"][-4:] == RUN
    assert container["resources"]["limits"] == {"cpu": 64, "nvidia.com/gpu": 8}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nproc", "2"], "needs the verb to run"),
        (["--nproc", "0", "train"], "must be at least 1"),
        (["--nnodes", "2", "train"], "needs --rendezvous HOST:PORT"),
        (["--k8s", "train"], "--k8s needs --image"),
        (["--k8s", "--slurm", "train"], "choose one"),
    ],
)
def test_refusals(words, says, capsys):
    assert main(["launch", *words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_run_and_their_exit_code_comes_back(tmp_path):
    command = [sys.executable, "-m", "puna", "launch", "--nproc", "2", "train", "--out", str(tmp_path / "x")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode != 0 and done.stderr.count("puna train needs --model.name") >= 1
