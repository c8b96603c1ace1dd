#!/usr/bin/env bash
# One node's part of train.sbatch, whose srun starts it on every node: torchrun, with its own log.
#
# Environment: as train.sbatch leaves it (LOG_DIR, RDZV_ID, NPROC_PER_NODE, ...). Arguments: the overrides.
set -euo pipefail
# shellcheck source=launchers/_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../_common.sh"

launch_topology_from_slurm
launch_check_topology
launch_torchrun "$LOG_DIR/node$NODE_RANK.restart${SLURM_RESTART_COUNT:-0}.log" "$@"
