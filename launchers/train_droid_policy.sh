#!/usr/bin/env bash
# Train a policy on DROID, on this node or as one node of several: start the same script on every node.
#
#   DATASET_PATH=/data/droid_1.0.1 launchers/train_droid_policy.sh
#   DATASET_PATH=/data/droid_1.0.1 NPROC_PER_NODE=8 NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 launchers/train_droid_policy.sh
#
# Environment (a variable that is unset or empty is left out):
#   DATASET_PATH          required: directory or URL of a LeRobot dataset, with the columns of lerobot/droid_1.0.1 unless
#                         an override says otherwise: data=droid_cosmos (nvidia/Cosmos3-DROID), data=lerobot (any). It
#                         becomes the source's root. Checked, with all overrides, before anything starts.
#   NPROC_PER_NODE        processes on this node, one a GPU; unset: torchrun's default, one.
#   NNODES                nodes; unset: one. More than one needs MASTER_ADDR.
#   NODE_RANK             this node's number, 0 to NNODES-1; unset: 0.
#   MASTER_ADDR           host name or address of node 0.
#   MASTER_PORT           a free port of node 0; unset: torchrun's default, 29500.
#   RUN_DIR               directory of the run, becomes paths.run_dir=RUN_DIR; unset: node 0 makes a new one.
#   LOG_DIR               directory of the log train_droid_policy.node<NODE_RANK>.log, which is appended to; unset: logs.
#   TAIL_OVERRIDES        bash array of overrides, for a script that sources this one: TAIL_OVERRIDES=(trainer.steps=5).
#   EXTRA_TAIL_OVERRIDES  overrides in one string, read with a shell's quoting but never executed, after TAIL_OVERRIDES:
#                         EXTRA_TAIL_OVERRIDES='trainer.steps=5 "name=my run"'.
#   CHECK_CONFIG          0: start torchrun without checking configuration and dataset first.
#   PYTHON                interpreter of the checks; unset: python. torchrun is taken from PATH, else it is PYTHON's.
#
# Under `srun` NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT come from SLURM when they are not given;
# launchers/slurm/train.sbatch is a whole job with preemption and requeue.
#
# Arguments, when executed: more overrides, after the others. The exit status is torchrun's, or 2 for a mistake in the
# above. TERM, INT, HUP and QUIT are handed on to torchrun.

# shellcheck source=launchers/_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/_common.sh" || return 2 2>/dev/null || exit 2

train_droid_policy() {
  launch_topology_from_slurm
  launch_check_topology || return
  launch_require_command "${PYTHON:-python}" "the environment variable PYTHON" || return
  local torchrun
  launch_find_torchrun || return
  launch_take_dataset || return

  local overrides=(+recipe=droid_policy) words
  [[ -z ${RUN_DIR:-} ]] || overrides+=("paths.run_dir=$(launch_quote_value "$RUN_DIR")")
  overrides+=("${TAIL_OVERRIDES[@]}")
  launch_split "${EXTRA_TAIL_OVERRIDES:-}" || return
  overrides+=("${words[@]}" "$@")
  launch_check "${overrides[@]}" || return
  launch_torchrun "${LOG_DIR:-logs}/train_droid_policy.node${NODE_RANK:-0}.log" "${overrides[@]}"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -euo pipefail
  train_droid_policy "$@"
else
  train_droid_policy # the arguments here would be the sourcing script's
fi
