"""How processes were started, and errors of their communication."""

import os

import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment

from dmjd.engine.device import make_fabric
from dmjd.engine.processes import (
    LostProcessError,
    explain_loss,
    find_launch,
    first_process_works,
    warn_alone,
)
from dmjd.warning import DMJDWarning

TASKS = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "train"}

BATCH = TASKS | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}  # a script of sbatch without srun

STEP = BATCH | {"SLURM_STEP_ID": "0"}

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "6", "RANK": "0", "LOCAL_RANK": "0"}

KUBEFLOW = {"KUBERNETES_PORT": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1", "WORLD_SIZE": "2", "RANK": "0"}

LSF = {"LSB_JOBID": "1", "LSB_DJOB_RANKFILE": "/none", "JSM_NAMESPACE_LOCAL_RANK": "0", "JSM_NAMESPACE_SIZE": "2"}


@pytest.fixture
def environment(monkeypatch):
    """Set variables, without those of a cluster that the tests may run on."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "JSM_")) or name in TORCHRUN:
            monkeypatch.delenv(name)

    def set_all(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("variables", "kind", "devices", "nodes"),
    [
        (TORCHRUN, TorchElasticEnvironment, 2, 3),
        (STEP, SLURMEnvironment, 2, 2),
        (STEP | {"SLURM_STEP_ID": "", "SLURM_STEPID": "3"}, SLURMEnvironment, 2, 2),
        ({}, LightningEnvironment, 1, 1),
        (TASKS, LightningEnvironment, 1, 1),  # a shell of salloc
        (BATCH, LightningEnvironment, 1, 1),
        (BATCH | {"SLURM_STEP_ID": "4294967291"}, LightningEnvironment, 1, 1),  # the batch script as a step
        (BATCH | {"SLURM_STEP_ID": "4294967290"}, LightningEnvironment, 1, 1),  # an interactive shell as a step
        (STEP | {"SLURM_PTY_PORT": "1"}, LightningEnvironment, 1, 1),  # srun --pty
        (STEP | {"SLURM_NTASKS": "1"}, LightningEnvironment, 1, 1),
        (STEP | {"SLURM_NTASKS": "two"}, LightningEnvironment, 1, 1),
        (KUBEFLOW, LightningEnvironment, 1, 1),
        (LSF, LightningEnvironment, 1, 1),
    ],
)
def test_launches(environment, variables, kind, devices, nodes):
    environment(variables)
    launch = find_launch()
    assert type(launch.environment) is kind
    assert (launch.devices, launch.nodes, launch.num_processes) == (devices, nodes, devices * nodes)


def test_tasks_must_be_spread_evenly(environment):
    environment(STEP | {"SLURM_NTASKS": "5"})
    with pytest.raises(ValueError, match="5 tasks cannot be spread evenly over 2 machines"):
        find_launch()


@pytest.mark.parametrize("variables", [TASKS, BATCH, KUBEFLOW, LSF, {"OMPI_COMM_WORLD_SIZE": "2"}])
def test_one_process_of_a_job_starts_alone_with_a_warning(environment, variables):
    environment(variables)
    with pytest.warns(DMJDWarning, match="neither srun nor torchrun started this process: it trains alone"):
        assert make_fabric("cpu", "fp32").world_size == 1
    assert make_fabric("cpu", "fp32", distributed=False).world_size == 1  # without a warning, which would be an error


def test_work_on_one_device_never_waits_for_others(environment):
    environment(STEP)
    with pytest.raises(ValueError, match="an evaluation trains on one device"):
        make_fabric("cpu", "fp32", distributed=False)


def test_no_warning_without_a_job(environment, recwarn):
    environment({"SLURM_NTASKS": "1"})
    warn_alone()
    assert not recwarn


def test_losses_of_other_processes():
    closed = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4711\nmore")
    assert explain_loss(ValueError("Connection closed by peer")) is None
    assert explain_loss(RuntimeError("other")) is None
    assert explain_loss(torch.distributed.DistBackendError("some words"), 0) == (
        "lost the connection to another process: some words"
    )
    text = explain_loss(closed, seconds=0)
    assert text is not None
    assert len(text.splitlines()) == 1
    assert "lost the connection to another process" in text
    assert "no answer from the other processes for 10 minutes" in (
        explain_loss(RuntimeError("gloo: Timed out"), 0) or ""
    )


def test_alone_no_process_waits():
    with pytest.raises(LostProcessError), first_process_works():
        raise LostProcessError("passes through")
