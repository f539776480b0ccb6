"""`puna launch`: what it hands to torchrun, exit codes, and manifests that start the same."""

import os
import signal
import subprocess
import sys

import pytest
import yaml

from launching import SECONDS
from puna.cli import main
from puna.cluster.torchrun import torchrun_arguments
from puna.commands import VERBS, command
from puna.commands.launch import LaunchOptions, manifest
from puna.options import options_of, parse

RUN = ["train", "run.yaml", "--mesh.tp", "2"]


def options(*words):
    return parse("launch", LaunchOptions, [*words, *RUN])


def test_one_machine_needs_no_rendezvous():
    assert torchrun_arguments(RUN, nproc=4) == ["--nproc-per-node=4", "--standalone", "-m", "puna", "--", *RUN]


def test_several_machines_meet_at_the_first():
    found = torchrun_arguments(RUN, nproc=8, nnodes=2, rendezvous="a:1")
    assert found[:4] == ["--nproc-per-node=8", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=a:1"]


def test_torchrun_leaves_every_option_of_every_verb_alone():
    from torch.distributed.run import parse_args

    words = [word for verb in VERBS for entry in options_of(command(verb)[1]).values() for word in (entry.flag, "2")]
    assert "--n" in words and "--start" in words  # prefixes of several of torchrun's
    found = parse_args(torchrun_arguments(["train", *words, "--", "--n"], nproc=2))
    assert found.training_script == "puna" and found.training_script_args == ["train", *words, "--", "--n"]


def test_a_leading_separator_is_torchruns(capsys):
    assert main(["--", "--version"]) == 0 and capsys.readouterr().out.startswith("puna ")


SBATCH = ("--slurm", "--nproc", "8", "--nnodes", "4", "--name", "big", "--time", "1:00:00")


def test_the_slurm_script_is_a_script():
    script = manifest(options(*SBATCH))
    for line in ("--nodes=4", "--gpus-per-node=8", "--job-name=big", "--time=1:00:00", "--signal=TERM@120"):
        assert f"#SBATCH {line}\n" in script
    start = f'srun {sys.executable} -m puna launch --nproc 8 --nnodes 4 --rendezvous "$head:29500"'
    assert f"{start} -- {' '.join(RUN)}\n" in script
    assert "--gpus-per-node" not in manifest(options("--slurm", "--no-gpus"))


@pytest.mark.parametrize(
    ("code", "left", "queued"), [(0, 90, False), (1, 90, False), (143, 90, True), (143, 5000, False)]
)
def test_the_slurm_script_runs_the_words_as_they_are_and_queues_itself_again(tmp_path, code, left, queued):
    """With stand-ins for Slurm's commands: what srun gets, and what is done after its exit code."""
    words = ["generate", "M", "a 'quoted' $HOME prompt", "--stop", "RENDEZVOUS\n*"]
    for name, body in {
        "srun": f"printf '%s\\0' \"$@\" > {tmp_path}/argv; exit {code}",
        "scontrol": f'if [ "$1" = show ]; then echo node0; echo node1; else echo "$@" > {tmp_path}/requeued; fi',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = manifest(parse("launch", LaunchOptions, ["--slurm", "--nproc", "2", "--nnodes", "2", *words]))
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_ID": "7"}
    now = int(subprocess.run(["date", "+%s"], capture_output=True, text=True).stdout)
    done = subprocess.run(["bash"], input=script, text=True, env=env | {"SLURM_JOB_END_TIME": str(now + left)})
    assert done.returncode == code and (tmp_path / "requeued").exists() == queued
    launched = (tmp_path / "argv").read_text().split("\0")[:-1]
    assert launched[:3] == [sys.executable, "-m", "puna"] and "node0:29500" in launched
    assert launched[launched.index("--") + 1 :] == words
    assert parse("launch", LaunchOptions, launched[4:]).command == tuple(words)


def test_the_kubernetes_manifest_is_a_service_and_a_job():
    words = ("--k8s", "--nproc", "8", "--nnodes", "4", "--image", "me/puna:1")
    service, job = yaml.safe_load_all(manifest(options(*words)))
    assert (service["kind"], job["kind"], job["spec"]["completions"]) == ("Service", "Job", 4)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["subdomain"] == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert container["command"][:2] == ["puna", "launch"]
    started = parse("launch", LaunchOptions, container["command"][2:])
    assert (started.nproc, started.nnodes, started.rendezvous) == (8, 4, "puna-0.puna:29500")
    assert started.command == tuple(RUN)
    assert container["resources"]["limits"] == {"cpu": 64, "nvidia.com/gpu": 8}


@pytest.mark.parametrize("kind", [["--slurm"], ["--k8s", "--image", "x"]])
def test_manifests_take_a_rendezvous(kind):
    text = manifest(options(*kind, "--rendezvous", "meet:1234"))
    assert "meet:1234" in text and "head:29500" not in text and "puna:29500" not in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nproc", "2"], "needs the verb to run"),
        (["--nproc", "0", "train"], "--nproc must be at least 1, not 0."),
        (["--nnodes", "2", "info", "x"], "needs --rendezvous HOST:PORT"),
        (
            ["--nnodes", "2", "--rendezvous", "foo", "info", "x"],
            "--rendezvous takes HOST:PORT, as node0:29500, not 'foo'",
        ),
        (["--rendezvous", "a:b:1", "info", "x"], "--rendezvous takes HOST:PORT"),
        (["--slurm", "--rendezvous", "http://a:1", "info", "x"], "--rendezvous takes HOST:PORT"),
        (["--slurm", "--rendezvous", "[fe80::1]:29500", "info", "x"], ""),
        (["--k8s", "info", "x"], "--k8s needs --image"),
        (["--k8s", "--slurm", "info", "x"], "choose one"),
        (["trian", "run.yaml"], "puna has no verb 'trian' (did you mean 'train'?)"),
        (["--nproc", "2", "generate", "M", "--temprature", "1"], "did you mean '--temperature'?"),
        (["--nproc", "2", "train", "nowhere.yaml"], "nowhere.yaml can't be read"),
        (["launch", "info", "x"], "a verb other than launch"),
        (["--slurm", "--time", "a day", "info", "x"], "is not a time limit of Slurm"),
        (["--slurm", "--name", "a b", "info", "x"], "is not a job name"),
        (["--slurm", "train", "--lr", "1", "there.yaml"], ""),
        (["--k8s", "--image", "x", "--name", "My_job", "info", "x"], "is not a name of Kubernetes"),
        (["--k8s", "--image", "x", "--name", "a" * 53, "info", "x"], "is not a name of Kubernetes"),
        (["--k8s", "--image", "x", "--volume", "A", "info", "x"], "is not a name of Kubernetes"),
        (["--k8s", "--image", "a b", "info", "x"], "is not the name of a container image"),
    ],
)
def test_refusals_come_before_torchrun(words, says, capsys):
    code = main(["launch", *words])
    err = capsys.readouterr().err
    assert code == (2 if says else 0) and says in err and err.count("\n") == bool(says)


def launch(*words, **kw):
    return subprocess.Popen([sys.executable, "-m", "puna", "launch", *words], stderr=subprocess.PIPE, text=True, **kw)


@pytest.mark.slow
def test_the_exit_code_of_a_rank_comes_back_with_one_sentence(tmp_path):
    process = launch("--nproc", "2", "info", str(tmp_path / "nothing"))
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 2 and "Traceback" not in err and err.count("here is no checkpoint") == 1


@pytest.mark.slow
def test_a_stopped_run_ends_without_a_traceback(tiny_checkpoint):
    model = str(tiny_checkpoint(max_position_embeddings=8192))
    words = ["generate", model, "x", "--max-tokens", "8000", "--ignore-eos"]
    process = launch("--nproc", "1", *words, stdout=subprocess.PIPE)
    assert process.stdout.read(1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 143 and "Traceback" not in err
