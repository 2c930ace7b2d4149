"""The scripts in docs/clusters.md: what can be known of them without a cluster."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

from modan_fast.cli import app

PAGE = (Path(__file__).parents[1] / "docs" / "clusters.md").read_text(encoding="utf-8")
SCRIPTS = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
(MANIFEST,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SERVICE, JOB = yaml.safe_load_all(MANIFEST)
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
(POD_SCRIPT,) = CONTAINER["args"]


def torchruns():
    """The arguments of each call of torchrun on the page."""
    for script in [*SCRIPTS, POD_SCRIPT]:
        for line in script.replace("\\\n", " ").splitlines():
            if "torchrun " in line:
                yield line.partition("torchrun ")[2].removesuffix(" &").split()


@pytest.mark.parametrize("script", [*SCRIPTS, POD_SCRIPT], ids=range(len(SCRIPTS) + 1))
def test_every_script_is_bash(script):
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("words", list(torchruns()), ids=lambda words: words[words.index("-m") + 2])
def test_torchrun_and_the_command_know_all_options(words):
    numbers = [re.sub(r'^"\$\w+"$', "2", word) for word in words]
    given = get_args_parser().parse_args(numbers)
    assert (given.module, given.training_script) == (True, "modan_fast")
    command, *options = given.training_script_args
    known = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "400"}).output
    assert not [each for each in options if each.startswith("--") and each not in known]


def test_the_pods_of_the_job_find_each_other_and_meet_at_the_first():
    assert JOB["spec"]["completionMode"] == "Indexed"
    assert JOB["spec"]["completions"] == JOB["spec"]["parallelism"]
    assert SERVICE["spec"]["clusterIP"] == "None"
    assert SERVICE["spec"]["selector"] == {"job-name": JOB["metadata"]["name"]}
    assert POD["subdomain"] == SERVICE["metadata"]["name"]
    (words,) = (words for words in torchruns() if "mulsupcon-0.mulsupcon:29500" in words)
    given = get_args_parser().parse_args(words)
    assert given.rdzv_endpoint == f"{JOB['metadata']['name']}-0.{POD['subdomain']}:29500"
    assert given.nnodes == str(JOB["spec"]["completions"])
    assert given.nproc_per_node == str(CONTAINER["resources"]["limits"]["nvidia.com/gpu"])
    assert {each["name"] for each in CONTAINER["volumeMounts"]} == {each["name"] for each in POD["volumes"]}


def test_a_job_that_is_to_end_saves_and_is_queued_again(tmp_path):
    """The Slurm script with stand-ins for the cluster's programs: USR1 becomes SIGTERM, then the job is requeued."""
    (script,) = (each for each in SCRIPTS if each.startswith("#!"))
    for name, body in {
        "scontrol": 'echo "$@" >> calls; echo node-1; echo node-2',
        # What srun does: it passes the signal on, and what it started saves and ends.
        "srun": "trap 'sleep 0.2; echo saved >> calls; exit 130' TERM\n"
        'echo "$@" > started\nsleep 0.3; kill -USR1 $PPID\nwhile :; do sleep 0.05; done',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    given["SLURM_JOB_NODELIST"] = "node-[1-2]"
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=given, timeout=60, check=False)
    assert (tmp_path / "calls").read_text().splitlines() == ["show hostnames node-[1-2]", "saved", "requeue 7"]
    started = (tmp_path / "started").read_text()
    assert "--rdzv-endpoint node-1:29500" in started
    assert started.endswith("--overwrite\n")
    (tmp_path / "runs" / "mulsupcon").mkdir(parents=True)
    (tmp_path / "runs" / "mulsupcon" / "checkpoint.pt").touch()
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=given, timeout=60, check=False)
    assert (tmp_path / "started").read_text().endswith("--resume\n")
