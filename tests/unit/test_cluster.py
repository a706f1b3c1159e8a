"""Every scheduler's variables give the right node; contradictions and bad numbers are named."""

import contextlib
import os
import random
import subprocess
import sys

import pytest
from commands import ROOT, run

from megatron_vl.cli.main import run as cli
from megatron_vl.errors import InputError
from megatron_vl.launch.cluster import (
    ROWS,
    ClusterEnv,
    check_one_launcher,
    check_started,
    cluster_env,
    hostfile_env,
)
from megatron_vl.launch.hostfile import expand_nodelist, parse_hostfile

DLC = {"MASTER_ADDR": "dlc1-master-0", "MASTER_PORT": "23456", "WORLD_SIZE": "2", "RANK": "1"}
TORCHRUN = {
    "WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400",
}  # fmt: skip
PYTORCHJOB = {  # newer: WORLD_SIZE counts processes, RANK nodes; see test_kubernetes.py
    "PET_NNODES": "2", "PET_NPROC_PER_NODE": "8", "PET_NODE_RANK": "1", "WORLD_SIZE": "16",
    "RANK": "1", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456",
    "PET_MASTER_ADDR": "job-master-0", "PET_MASTER_PORT": "23456",
}  # fmt: skip
TRAINJOB = {
    "PET_NNODES": "4", "PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": "3",
    "PET_MASTER_ADDR": "job-node-0-0.job", "PET_MASTER_PORT": "29500",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "200505", "SLURM_JOB_NODELIST": "n[001-003,010]", "SLURM_NNODES": "4",
    "SLURM_NODEID": "3", "SLURM_GPUS_ON_NODE": "8",
}  # fmt: skip
VOLCANO = {"VC_WORKER_HOSTS": "j-worker-0.j,j-worker-1.j", "VC_WORKER_NUM": "2",
           "VC_TASK_INDEX": "1", "VK_TASK_INDEX": "1"}
TWO_TASKS = VOLCANO | {"VC_MASTER_HOSTS": "j-master-0.j", "VC_MASTER_NUM": "1"}
MODELARTS = {"VC_WORKER_HOSTS": "10.0.0.7,10.0.0.8", "VC_WORKER_NUM": "2", "VC_TASK_INDEX": "1",
             "MA_NUM_HOSTS": "2", "MA_NUM_GPUS": "8"}
VOLCENGINE = {"MLP_WORKER_NUM": "2", "MLP_WORKER_GPU": "8", "MLP_ROLE_INDEX": "1",
              "MLP_WORKER_0_HOST": "10.1.0.1", "MLP_WORKER_0_PORT": "2222"}
AFO = {"AFO_ENV_CLUSTER_SPEC":
       '{"role":"worker","index":1,"worker":["h0.example:3900,3901","h1.example:3900"]}'}
MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
       "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "10.2.0.1"}
PLAIN = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501",
         "NPROC_PER_NODE": "8"}  # ms-swift, LLaMA-Factory, and scripts around torchrun
TWO_NODES = SLURM | {"SLURM_JOB_NODELIST": "n[001-002]", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}

# nnodes, node_rank, nproc_per_node, master_addr, master_port, source
FOUND = {
    "nothing": ({}, (1, 0, None, "127.0.0.1", 29500, "this machine")),
    "an address alone": ({"MASTER_ADDR": "x", "RANK": "0", "WORLD_SIZE": " "},
                         (1, 0, None, "127.0.0.1", 29500, "this machine")),
    "processes alone": ({"NPROC_PER_NODE": "3"}, (1, 0, 3, "127.0.0.1", 29500, "this machine")),
    "DLC": (DLC, (2, 1, None, "dlc1-master-0", 23456, "PAI-DLC")),
    "DLC with processes": (DLC | {"NPROC_PER_NODE": "4", "KUBERNETES_CONTAINER_RESOURCE_GPU": "8"},
                           (2, 1, 4, "dlc1-master-0", 23456, "PAI-DLC")),
    "older DLC": (DLC | {"KUBERNETES_CONTAINER_RESOURCE_GPU": "8"},
                  (2, 1, 8, "dlc1-master-0", 23456, "PAI-DLC")),
    "DLC without GPUs": (DLC | {"KUBERNETES_CONTAINER_RESOURCE_GPU": "0"},
                         (2, 1, None, "dlc1-master-0", 23456, "PAI-DLC")),
    "DLC of one node": ({"WORLD_SIZE": "1"}, (1, 0, None, "127.0.0.1", 29500, "PAI-DLC")),
    "torchrun": (TORCHRUN, (2, 1, 4, "10.0.0.1", 29400, "torchrun")),
    "torchrun in a Slurm job": (TORCHRUN | SLURM, (2, 1, 4, "10.0.0.1", 29400, "torchrun")),
    "PyTorchJob": (PYTORCHJOB, (2, 1, 8, "job-master-0", 23456, "PyTorchJob")),
    "PyTorchJob that counts replicas": (
        PYTORCHJOB | {"WORLD_SIZE": "2", "PET_NPROC_PER_NODE": "auto"},
        (2, 1, None, "job-master-0", 23456, "PyTorchJob")),
    "PyTorchJob with a range": (PYTORCHJOB | {"PET_NNODES": "1:3"},
                                (2, 1, 8, "job-master-0", 23456, "PyTorchJob")),
    "PyTorchJob with a range of one": (PYTORCHJOB | {"PET_NNODES": "2:2"},
                                       (2, 1, 8, "job-master-0", 23456, "PyTorchJob")),
    "old PyTorchJob": (DLC, (2, 1, None, "dlc1-master-0", 23456, "PAI-DLC")),
    "TrainJob": (TRAINJOB, (4, 3, None, "job-node-0-0.job", 29500, "TrainJob")),
    "TrainJob with processes": (TRAINJOB | {"PET_NPROC_PER_NODE": "8"},
                                (4, 3, 8, "job-node-0-0.job", 29500, "TrainJob")),
    "Slurm": (SLURM, (4, 3, 8, "n001", 10505, "Slurm")),
    "a step of a Slurm job": (
        SLURM | {"SLURM_STEP_NODELIST": "n[002-003]", "SLURM_STEP_NUM_NODES": "2",
                 "SLURM_NODEID": "1"}, (2, 1, 8, "n002", 10505, "Slurm")),
    "Slurm with a port": (SLURM | {"MASTER_PORT": "4000", "MASTER_ADDR": "ib1"},
                          (4, 3, 8, "ib1", 4000, "Slurm")),
    "an allocation of one node": ({"SLURM_JOB_ID": "1", "SLURM_NNODES": "1"},
                                  (1, 0, None, "127.0.0.1", 29500, "this machine")),
    "Volcano": (VOLCANO, (2, 1, None, "j-worker-0.j", 29500, "Volcano")),
    "Volcano's master": (TWO_TASKS | {"HOSTNAME": "j-master-0", "VC_TASK_INDEX": "0",
                                      "VK_TASK_INDEX": "0"},
                         (3, 0, None, "j-master-0.j", 29500, "Volcano")),
    "Volcano's worker": (TWO_TASKS | {"HOSTNAME": "j-worker-1"},
                         (3, 2, None, "j-master-0.j", 29500, "Volcano")),
    "ModelArts": (MODELARTS, (2, 1, 8, "10.0.0.7", 29500, "ModelArts")),
    "ModelArts alone": ({"MA_NUM_HOSTS": "1", "MA_NUM_GPUS": "8"},
                        (1, 0, 8, "127.0.0.1", 29500, "ModelArts")),
    "Volcengine": (VOLCENGINE, (2, 1, 8, "10.1.0.1", 2222, "Volcengine")),
    "AFO": (AFO, (2, 1, None, "h0.example", 3900, "Meituan AFO")),
    "MPI, a process a node": (MPI, (2, 1, None, "10.2.0.1", 29500, "Open MPI")),
    "MPI, four processes a node": (
        MPI | {"OMPI_COMM_WORLD_RANK": "6", "OMPI_COMM_WORLD_SIZE": "8",
               "OMPI_COMM_WORLD_LOCAL_RANK": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
        (2, 1, 4, "10.2.0.1", 29500, "Open MPI")),
    "MPI with WORLD_SIZE": (MPI | {"WORLD_SIZE": "2", "RANK": "1"},
                            (2, 1, None, "10.2.0.1", 29500, "PAI-DLC")),
    "MPI in a Slurm job": (MPI | TWO_NODES, (2, 1, None, "10.2.0.1", 29500, "Open MPI")),
    "plain names": (PLAIN, (2, 1, 8, "10.0.0.1", 29501, "NNODES and NODE_RANK")),
    "plain names without a port": ({"NNODES": "3", "NODE_RANK": "0", "MASTER_ADDR": "a"},
                                   (3, 0, None, "a", 29500, "NNODES and NODE_RANK")),
    "plain names of one node": ({"NNODES": "1", "NODE_RANK": "0"},
                                (1, 0, None, "127.0.0.1", 29500, "NNODES and NODE_RANK")),
    "one node by its number": ({"NNODES": "1"}, (1, 0, None, "127.0.0.1", 29500, "this machine")),
    "plain names and processes": (PLAIN | {"WORLD_SIZE": "16"},
                                  (2, 1, 8, "10.0.0.1", 29501, "NNODES and NODE_RANK")),
    "plain names made of DLC's": (DLC | {"NNODES": "2", "NODE_RANK": "1"},
                                  (2, 1, None, "dlc1-master-0", 23456, "NNODES and NODE_RANK")),
    "DLC with its number of nodes again": (DLC | {"NNODES": "2"},
                                           (2, 1, None, "dlc1-master-0", 23456, "PAI-DLC")),
    "plain names in a Slurm job": (PLAIN | TWO_NODES,
                                   (2, 1, 8, "10.0.0.1", 29501, "NNODES and NODE_RANK")),
}


@pytest.mark.parametrize(("environ", "expected"), FOUND.values(), ids=FOUND)
def test_each_schedulers_variables_give_the_node(environ, expected):
    names = ("nnodes", "node_rank", "nproc_per_node", "master_addr", "master_port", "source")
    assert cluster_env(environ) == ClusterEnv(**dict(zip(names, expected, strict=True)))


def test_every_row_has_a_fixture():
    assert {row.source for row in ROWS} <= {expected[-1] for _, expected in FOUND.values()}


def without(environ, *names):
    return {name: value for name, value in environ.items() if name not in names}


REFUSED = {
    "DLC without an address": (
        without(DLC, "MASTER_ADDR"), "MASTER_ADDR is not set although this looks like PAI-DLC"),
    "DLC without a rank": (without(DLC, "RANK"), "RANK is not set although"),
    "a word for a number": (DLC | {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; it must be a whole"),
    "a fraction": (DLC | {"RANK": "0.5"}, "RANK is '0.5'; it must be a whole number"),
    "no nodes": (DLC | {"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; it must be a whole number of at "
                 "least 1"),
    "a rank too many": (DLC | {"RANK": "2"}, "RANK is 2 but WORLD_SIZE is 2"),
    "a port that is none": (DLC | {"MASTER_PORT": "70000"}, "MASTER_PORT is 70000; a port is from"),
    "no processes": (DLC | {"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE is '0'"),
    "other digits": (DLC | {"WORLD_SIZE": "٢"}, "WORLD_SIZE is '٢'"),
    "torchrun without the node's size": (
        without(TORCHRUN, "LOCAL_WORLD_SIZE"), "LOCAL_WORLD_SIZE is not set"),
    "torchrun on one node of a job of several": (
        SLURM | {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
        "SLURM_NNODES is 4, but torchrun started its ranks on this node alone"),
    "torchrun without its nodes": (
        TORCHRUN | {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "5", "NNODES": "2"},
        "NNODES is 2, but torchrun started its ranks on this node alone"),
    "torchrun's uneven nodes": (
        TORCHRUN | {"LOCAL_WORLD_SIZE": "3"}, "WORLD_SIZE is 8 but LOCAL_WORLD_SIZE is 3"),
    "torchrun's ranks": (TORCHRUN | {"RANK": "6"}, "RANK is 6 but LOCAL_RANK of 4 is 1"),
    "torchrun's world": (TORCHRUN | {"RANK": "9"}, "RANK is 9 but WORLD_SIZE is 8"),
    "PyTorchJob's nodes": (
        PYTORCHJOB | {"PET_NNODES": "3"}, "PET_NNODES is 3 but WORLD_SIZE is 16"),
    "PyTorchJob's ranks": (
        PYTORCHJOB | {"RANK": "0"}, "PET_NODE_RANK is 1 but RANK is 0"),
    "PyTorchJob's addresses": (
        PYTORCHJOB | {"PET_MASTER_ADDR": "elsewhere"},
        "PET_MASTER_ADDR is elsewhere but MASTER_ADDR is job-master-0"),
    "PyTorchJob's ports": (
        PYTORCHJOB | {"PET_MASTER_PORT": "1"}, "PET_MASTER_PORT is 1 but MASTER_PORT is 23456"),
    "PyTorchJob's processes": (
        PYTORCHJOB | {"NPROC_PER_NODE": "4"}, "PET_NPROC_PER_NODE is 8 but NPROC_PER_NODE is 4"),
    "PyTorchJob's words": (
        PYTORCHJOB | {"PET_NPROC_PER_NODE": "all"}, "PET_NPROC_PER_NODE is 'all'"),
    "a range that nothing decides": (
        TRAINJOB | {"PET_NNODES": "1:3"}, "PET_NNODES is 1:3, but a run has a fixed number"),
    "a range that may be two numbers": (
        PYTORCHJOB | {"PET_NNODES": "1:4", "WORLD_SIZE": "4", "PET_NPROC_PER_NODE": "2"},
        "which may be"),
    "a range upside down": (TRAINJOB | {"PET_NNODES": "3:1"}, "PET_NNODES is '3:1'"),
    "TrainJob without a rank": (
        without(TRAINJOB, "PET_NODE_RANK"), "PET_NODE_RANK is not set although"),
    "Slurm's number of nodes": (
        SLURM | {"SLURM_NNODES": "3"},
        "SLURM_NNODES is 3 but the number of hosts in SLURM_JOB_NODELIST is 4"),
    "Slurm's list": (SLURM | {"SLURM_JOB_NODELIST": "n[001-"}, "SLURM_JOB_NODELIST is 'n[001-'"),
    "Slurm's range": (
        SLURM | {"SLURM_JOB_NODELIST": "n[4-2]"}, "[4-2] is no range of hosts"),
    "Slurm's node": (SLURM | {"SLURM_NODEID": "4"}, "SLURM_NODEID is 4 but SLURM_NNODES is 4"),
    "Slurm's job": (SLURM | {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID is 'x'"),
    "Volcano's number": (
        VOLCANO | {"VC_WORKER_NUM": "3"},
        "VC_WORKER_NUM is 3 but the number of VC_WORKER_HOSTS is 2"),
    "Volcano's two indices": (
        VOLCANO | {"VK_TASK_INDEX": "0"}, "VC_TASK_INDEX is 1 but VK_TASK_INDEX is 0"),
    "Volcano's index": (
        VOLCANO | {"VK_TASK_INDEX": "2", "VC_TASK_INDEX": "2"}, "VC_TASK_INDEX is 2 but the"),
    "Volcano without an index": (
        without(VOLCANO, "VC_TASK_INDEX", "VK_TASK_INDEX"), "VC_TASK_INDEX is not set"),
    "Volcano's task unknown": (TWO_TASKS | {"HOSTNAME": "other"}, "HOSTNAME is 'other', which is"),
    "ModelArts' hosts": (
        MODELARTS | {"MA_NUM_HOSTS": "3"}, "MA_NUM_HOSTS is 3 but VC_WORKER_NUM is 2"),
    "ModelArts' list": (
        MODELARTS | {"VC_WORKER_HOSTS": "a"},
        "MA_NUM_HOSTS is 2 but the number of VC_WORKER_HOSTS is 1"),
    "Volcengine's address": (
        VOLCENGINE | {"MASTER_ADDR": "10.1.0.9"},
        "MLP_WORKER_0_HOST is 10.1.0.1 but MASTER_ADDR is 10.1.0.9"),
    "Volcengine's node": (VOLCENGINE | {"MLP_ROLE_INDEX": "2"}, "MLP_ROLE_INDEX is 2 but"),
    "AFO that is no JSON": ({"AFO_ENV_CLUSTER_SPEC": "{"}, "AFO_ENV_CLUSTER_SPEC is '{'"),
    "AFO without ports": (
        {"AFO_ENV_CLUSTER_SPEC": '{"role":"worker","index":0,"worker":["h"]}'}, "it must be like"),
    "AFO's index": (
        {"AFO_ENV_CLUSTER_SPEC": '{"role":"worker","index":2,"worker":["h:1"]}'},
        "index of AFO_ENV_CLUSTER_SPEC is 2 but"),
    "AFO's port": (AFO | {"MASTER_PORT": "1"}, "MASTER_PORT is 1 but that of AFO"),
    "MPI without an address": (without(MPI, "MASTER_ADDR"), "MASTER_ADDR is not set"),
    "MPI mapped by node": (
        MPI | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
               "OMPI_COMM_WORLD_LOCAL_RANK": "0"},
        "OMPI_COMM_WORLD_RANK is 1 but OMPI_COMM_WORLD_LOCAL_RANK of 2 is 0"),
    "MPI's uneven nodes": (
        MPI | {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"},
        "OMPI_COMM_WORLD_SIZE is 3 but OMPI_COMM_WORLD_LOCAL_SIZE is 2"),
    "plain names without an address": (
        without(PLAIN, "MASTER_ADDR"), "MASTER_ADDR is not set although this looks like NNODES"),
    "plain names beyond the last": (PLAIN | {"NODE_RANK": "2"}, "NODE_RANK is 2 but NNODES is 2"),
    "a plain range": (PLAIN | {"NNODES": "1:2"}, "NNODES is '1:2'; it must be a whole number"),
    # ---- of two rows
    "an exported world of one in a Slurm job": (
        SLURM | {"WORLD_SIZE": "1"}, "WORLD_SIZE is 1 but SLURM_NNODES is 4"),
    "exported processes in a Slurm job": (
        SLURM | {"WORLD_SIZE": "32", "RANK": "3", "MASTER_ADDR": "n001"},
        "WORLD_SIZE is 32 but SLURM_NNODES is 4"),
    "the rank of a process in a Slurm job": (
        SLURM | {"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "n001"},
        "this node's number as PAI-DLC tells it is 0 but SLURM_NODEID is 3"),
    "MPI on a part of a Slurm job": (
        MPI | SLURM, "SLURM_NNODES is 4 but OMPI_COMM_WORLD_SIZE is 2"),
    "plain names in a larger Slurm job": (PLAIN | SLURM, "NNODES is 2 but SLURM_NNODES is 4"),
    "plain names and a world of one": (
        PLAIN | {"WORLD_SIZE": "1"}, "NNODES is 2 but WORLD_SIZE is 1"),
    "a plain number in a TrainJob": (TRAINJOB | {"NNODES": "1"}, "NNODES is 1 but PET_NNODES is 4"),
    "a plain number in a Volcano job": (
        VOLCANO | {"NNODES": "3"},
        "the number of nodes as Volcano tells it is 2 but NNODES is 3"),
    "a plain rank on Volcengine": (
        VOLCENGINE | {"NODE_RANK": "0"},
        "this node's number as Volcengine tells it is 1 but NODE_RANK is 0"),
    "a world of one on ModelArts": (
        MODELARTS | {"WORLD_SIZE": "1"}, "MA_NUM_HOSTS is 2 but WORLD_SIZE is 1"),
    # ---- of no row
    **{f"{name} of no row": ({name: value}, f"{name} is {value}, so there is more than one node")
       for name, value in (
           ("NNODES", "2"), ("NODE_RANK", "1"), ("RANK", "3"), ("SLURM_JOB_NUM_NODES", "2"),
           ("PBS_NUM_NODES", "2"), ("NHOSTS", "4"), ("PMI_SIZE", "2"), ("MV2_COMM_WORLD_SIZE", "8"),
           ("SKYPILOT_NUM_NODES", "2"), ("AWS_BATCH_JOB_NUM_NODES", "2"), ("NUM_NODES", "16"),
           ("AZUREML_NODE_COUNT", "2"), ("ARNOLD_WORKER_NUM", "2"), ("FLUX_JOB_NNODES", "2"),
       )},
    "an allocation's own shell": (
        {"SLURM_JOB_ID": "1", "SLURM_NNODES": "2"},
        "start the command on all of them with srun, or set NNODES, NODE_RANK and MASTER_ADDR"),
}  # fmt: skip


@pytest.mark.parametrize(("environ", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_with_names_and_values(environ, sentence):
    with pytest.raises(InputError) as refused:
        cluster_env(environ)
    said = str(refused.value)
    assert sentence in said and said.endswith(".") and "\n" not in said


@pytest.mark.parametrize(("flags", "says"), [
    ([], "NNODES is 2, so there is more than one node"),
    (["--cluster-env"], "NNODES is 2, so there is more than one node"),
    # This machine alone: the next thing that is wrong is told.
    (["--no-cluster-env"], "none is not a directory"),
    (["--nnodes", "1"], "none is not a directory"),
])
def test_a_training_does_not_start_alone_where_there_are_others(flags, says, monkeypatch, capsys):
    monkeypatch.setenv("NNODES", "2")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert cli(["train", "--hf-config", "none", "--train-data-path", "none", *flags]) == 2
    assert says in capsys.readouterr().err


def test_ranks_of_another_launcher_do_not_train_alone_where_there_are_others(monkeypatch, capsys):
    for name, value in {"NNODES": "2", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "8",
                        "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert cli(["train", "--hf-config", "none", "--train-data-path", "none",
                "--distributed-timeout-minutes", "0.05"]) == 2
    assert "NNODES is 2" in capsys.readouterr().err


NOT_ONE_A_NODE = {
    "mpirun with a process a rank": (
        MPI | {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
               "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, "--map-by ppr:1:node"),
    "srun with a task a rank": (
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "8(x4)", "SLURM_STEP_ID": "0"},
        "--ntasks-per-node=1"),
    "a batch script": (SLURM, "start the command on all of them with srun"),
}


@pytest.mark.parametrize("world", [
    {"WORLD_SIZE": "8"}, {"WORLD_SIZE": "12", "LOCAL_WORLD_SIZE": "8"},
    {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"},
])
def test_ranks_of_another_launcher_are_refused_only_where_they_are_alone_among_several(world):
    check_started(world)
    alone = world["WORLD_SIZE"] == world.get("LOCAL_WORLD_SIZE")
    with pytest.raises(InputError, match="NNODES is 2") if alone else contextlib.nullcontext():
        check_started(world | {"NNODES": "2"})


@pytest.mark.parametrize(("environ", "sentence"), NOT_ONE_A_NODE.values(), ids=NOT_ONE_A_NODE)
def test_a_node_that_is_started_more_than_once_is_refused(environ, sentence):
    with pytest.raises(InputError, match=sentence):
        check_one_launcher(environ, cluster_env(environ))


def test_one_launcher_a_node_is_what_a_run_needs():
    step = SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_STEP_ID": "0"}
    for environ in (DLC, MPI, step, {}):
        check_one_launcher(environ, cluster_env(environ))


@pytest.mark.parametrize(("text", "hosts"), [
    ("login", ["login"]),
    ("n[001-003]", ["n001", "n002", "n003"]),
    ("n[001,3-4],m1,r[1-2]n[08-10]",
     ["n001", "n3", "n4", "m1", "r1n08", "r1n09", "r1n10", "r2n08", "r2n09", "r2n10"]),
    ("a[9-11].x", ["a9.x", "a10.x", "a11.x"]),
])
def test_slurms_list_of_hosts_is_written_out(text, hosts):
    assert expand_nodelist(text) == hosts


@pytest.mark.parametrize("text", ["", ",", "a,,b", "n[", "n]", "n[]", "n[a]", "n[1-2", "a,"])
def test_what_is_no_list_of_hosts_is_refused(text):
    with pytest.raises(InputError, match="SLURM_JOB_NODELIST is"):
        expand_nodelist(text)


def test_any_characters_give_hosts_or_a_sentence():
    letters = random.Random(0)
    for _ in range(3000):
        text = "".join(letters.choices("n12[],-0 x", k=letters.randint(0, 12)))
        for read in (expand_nodelist, lambda text: parse_hostfile(text, "hosts")):
            try:
                assert read(text)
            except InputError as error:
                assert str(error).endswith(".")


# ---- a hostfile -------------------------------------------------------------------------------

HOSTS = "# two nodes\n10.0.0.1 slots=8\n\nroot@10.0.0.2 slots=8  # the other\n"


def test_a_hostfile_gives_this_machines_line():
    hosts = parse_hostfile(HOSTS, "hosts")
    assert [(host.name, host.slots) for host in hosts] == [("10.0.0.1", 8), ("root@10.0.0.2", 8)]
    env = hostfile_env(hosts, {}, {"10.0.0.2", "b"})
    assert env == ClusterEnv(nnodes=2, node_rank=1, nproc_per_node=8, master_addr="10.0.0.1",
                             source="hostfile")
    assert hostfile_env(hosts, {"NODE_RANK": "0"}, set()).node_rank == 0
    with pytest.raises(InputError, match="0 of the 2 hosts of the hostfile are this machine"):
        hostfile_env(hosts, {}, {"10.0.0.3"})
    with pytest.raises(InputError, match="NODE_RANK is 2 but the number of hosts"):
        hostfile_env(hosts, {"NODE_RANK": "2"}, set())


@pytest.mark.parametrize(("text", "sentence"), [
    ("", "names no host"),
    ("a\na\n", "names a twice"),
    ("a\nroot@a\n", "names a twice"),
    ("a slots=8\nb slots=4\n", "gives a slots=8 but b slots=4"),
    ("a slots=0\n", "line 1 of hosts is 'a slots=0'"),
    ("a b\n", "line 1 of hosts is 'a b'"),
    ("ok\n-oProxyCommand=x\n", "line 2 of hosts is '-oProxyCommand=x'"),
    ("a;b\n", "line 1 of hosts"),
])
def test_a_bad_hostfile_is_refused(text, sentence):
    with pytest.raises(InputError, match=sentence):
        parse_hostfile(text, "hosts")


# ---- the command ------------------------------------------------------------------------------


@pytest.fixture
def on(monkeypatch):
    """Give this process a scheduler's variables and none beside."""
    def on(environ):
        for name in list(os.environ):
            if name.startswith(("SLURM", "OMPI", "PET_", "VC_", "MLP_", "MASTER")) or name in (
                "RANK", "WORLD_SIZE", "LOCAL_RANK", "NPROC_PER_NODE", "NODE_RANK"):
                monkeypatch.delenv(name)
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
    return on


def test_cluster_env_prints_one_value_bare_or_all(on, capsys):
    on(DLC | {"NPROC_PER_NODE": "4"})
    values = {"nnodes": "2", "master_addr": "dlc1-master-0", "master_port": "23456",
              "nproc_per_node": "4", "node_rank": "1"}
    for name, value in values.items():
        assert cli(["cluster-env", name]) == 0
        assert capsys.readouterr().out == f"{value}\n"
    assert cli(["cluster-env"]) == 0
    lines = [f"{name}={value}" for name, value in values.items()]
    assert capsys.readouterr().out.splitlines() == [*lines, "source=PAI-DLC"]


def test_cluster_env_counts_this_machines_devices_when_nobody_says(on, capsys):
    import torch

    on({})
    assert cli(["cluster-env"]) == 0
    said = capsys.readouterr().out
    assert f"nproc_per_node={torch.cuda.device_count() or 1}\n" in said
    assert said.endswith("source='this machine'\n")


COUNTS = """
import sys
from megatron_vl.launch import devices
devices.DRIVERS = sys.argv[1:]
print(devices.devices() >= 1, "torch" in sys.modules)
"""


@pytest.mark.parametrize(("drivers", "asks_torch"), [
    ((), False), (("/dev/none",), False), (("/dev/none", "/dev/null"), True),
])
def test_torch_is_imported_to_count_devices_only_where_a_driver_is(drivers, asks_torch):
    done = run([sys.executable, "-c", COUNTS, *drivers])
    assert done.out == f"True {asks_torch}\n", done.text


def test_cluster_env_refuses_with_code_2_and_one_sentence(on, capsys, tmp_path):
    on(DLC | {"RANK": "7"})
    assert cli(["cluster-env", "nnodes"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("megatron-vl cluster-env: RANK is 7 but WORLD_SI")
    assert cli(["cluster-env", "--hostfile", str(tmp_path / "none")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_cluster_env_reads_a_hostfile(on, capsys, tmp_path):
    on({"NODE_RANK": "1"})
    (tmp_path / "hosts").write_text(HOSTS)
    assert cli(["cluster-env", "--hostfile", str(tmp_path / "hosts"), "master_addr"]) == 0
    assert capsys.readouterr().out == "10.0.0.1\n"


def test_the_script_users_know_prints_the_same():
    script = ROOT / "toolkits" / "parse_environment.py"
    for name, value in (("nnodes", "4"), ("node_rank", "3"), ("master_addr", "n001"),
                        ("master_port", "10505"), ("nproc_per_node", "8")):
        # As in a container: another directory, the program not installed.
        env = {**without(os.environ, "PYTHONPATH"), **SLURM}
        done = subprocess.run([sys.executable, script, name], cwd="/", env=env, text=True,
                              capture_output=True)
        assert (done.returncode, done.stdout) == (0, f"{value}\n"), done.stderr
    done = run([sys.executable, script, "nodes"])
    assert done.code == 2 and "invalid choice: 'nodes'" in done.err
