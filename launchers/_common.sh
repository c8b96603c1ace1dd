# shellcheck shell=bash
# What the launchers share. Sourced; defines functions named launch_*, runs nothing.
#
# A function that finds a mistake says what, where and the remedy on stderr and returns 2, so that a launcher works
# the same whether it is executed or sourced, with `set -e` or without.

# launch_fail WHAT WHERE REMEDY
launch_fail() {
  printf 'error: %s\n  where:  %s\n  remedy: %s\n' "$1" "$2" "$3" >&2
  return 2
}

# launch_require_integer NAME MINIMUM: the variable NAME is unset, empty or an integer of at least MINIMUM.
launch_require_integer() {
  local value=${!1:-}
  if [[ -z $value ]]; then
    return 0
  fi
  # No leading zeros: shell arithmetic would read 010 as 8. 18 digits fit its 64 bits.
  if ! [[ $value =~ ^(0|[1-9][0-9]{0,17})$ ]] || ((value < $2)); then
    launch_fail "$1 must be an integer of at least $2, got '$value'" "the environment variable $1" \
      "set $1 to a number, or unset it"
  fi
}

# launch_node_address NODE: the address at which SLURM itself reaches NODE.
launch_node_address() {
  local described
  described=$(scontrol show node "$1" --oneliner 2>/dev/null) || described=''
  if [[ $described =~ (^|[[:space:]])NodeAddr=([^[:space:]]+) ]]; then
    printf '%s' "${BASH_REMATCH[2]}"
  else
    printf '%s' "$1"
  fi
}

# Inside a SLURM job step the topology comes from it unless it is given: NNODES, NODE_RANK, NPROC_PER_NODE (the GPUs that
# SLURM gave to the node), MASTER_ADDR, LOCAL_ADDR (this node's address) and MASTER_PORT. The port is derived from the
# job's number, so that jobs which share a node don't meet.
launch_topology_from_slurm() {
  if [[ -z ${SLURM_JOB_ID:-} || -z ${SLURM_STEP_ID:-} ]]; then
    return 0
  fi
  : "${NNODES:=${SLURM_STEP_NUM_NODES:-1}}" "${NODE_RANK:=${SLURM_NODEID:-0}}"
  if ((NNODES > 1)) && [[ -z ${MASTER_ADDR:-} ]]; then
    local first
    first=$(scontrol show hostnames "${SLURM_STEP_NODELIST:-$SLURM_JOB_NODELIST}")
    MASTER_ADDR=$(launch_node_address "${first%%$'\n'*}")
  fi
  if [[ -z ${LOCAL_ADDR:-} && -n ${SLURMD_NODENAME:-} ]]; then
    LOCAL_ADDR=$(launch_node_address "$SLURMD_NODENAME")
  fi
  : "${NPROC_PER_NODE:=${SLURM_GPUS_ON_NODE:-}}"
  : "${MASTER_PORT:=$((20000 + SLURM_JOB_ID % 10000))}"
}

# The variables that describe the processes and nodes agree with each other.
launch_check_topology() {
  launch_require_integer NPROC_PER_NODE 1 || return
  launch_require_integer NNODES 1 || return
  launch_require_integer NODE_RANK 0 || return
  launch_require_integer MASTER_PORT 1 || return
  local nodes=${NNODES:-1} node=${NODE_RANK:-0}
  if ((node >= nodes)); then
    launch_fail "NODE_RANK=$node is outside of NNODES=$nodes" "the environment variables NODE_RANK and NNODES" \
      "give every node its own NODE_RANK from 0 to $((nodes - 1)), and all of them the same NNODES"
    return
  fi
  if ((nodes > 1)) && [[ -z ${MASTER_ADDR:-} ]]; then
    launch_fail "NNODES=$nodes needs MASTER_ADDR" "the environment variable MASTER_ADDR" \
      "set MASTER_ADDR to the host name or address of node 0, the same on every node"
    return
  fi
  if ((nodes > 1)) && [[ -z ${NODE_RANK:-} ]]; then
    printf 'note: NODE_RANK is not set: this node is node 0 of %s\n' "$nodes" >&2
  fi
}

# launch_require_command COMMAND VARIABLE
launch_require_command() {
  if ! command -v -- "$1" >/dev/null; then
    launch_fail "command '$1' not found" "$2" "activate the environment, e.g. source .venv/bin/activate"
  fi
}

# launch_find_torchrun: fill the array `torchrun` with the command, which needn't be on PATH: it is a module of torch.
launch_find_torchrun() {
  if command -v -- torchrun >/dev/null; then
    torchrun=(torchrun)
  elif "${PYTHON:-python}" -I -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)'; then
    torchrun=("${PYTHON:-python}" -m torch.distributed.run)
  else
    launch_fail "neither 'torchrun' nor torch found" "PATH, and the environment variable PYTHON (${PYTHON:-python})" \
      "activate the environment, e.g. source .venv/bin/activate"
  fi
}

# DATASET_PATH is set, and becomes the root of the sources of `data=droid`, `droid_cosmos` and `lerobot`.
launch_take_dataset() {
  if [[ -z ${DATASET_PATH:-} ]]; then
    launch_fail "DATASET_PATH is not set" "the environment variable DATASET_PATH" \
      "set DATASET_PATH to the directory or the URL of a LeRobot dataset"
    return
  fi
  export DATASET_PATH DROID_ROOT=$DATASET_PATH
}

# launch_split TEXT: fill the array `words` with the words of TEXT, read with a shell's rules for quotes and
# backslashes. Nothing in TEXT is expanded or executed.
launch_split() {
  words=()
  if [[ -z $1 ]]; then
    return 0
  fi
  # -I: the working directory can't shadow a module.
  local split='import shlex, sys; sys.stdout.write("".join(word + "\0" for word in shlex.split(sys.argv[1])))'
  # shellcheck disable=SC2034 # the caller's
  mapfile -d '' -t words < <("${PYTHON:-python}" -I -c "$split" "$1" 2>/dev/null)
  if ! wait "$!"; then
    launch_fail "the quotes of '$1' are not balanced" "the environment variable EXTRA_TAIL_OVERRIDES" \
      "close every quote; a quote that is meant literally needs a backslash"
  fi
}

# launch_check OVERRIDE...: the program itself says what is wrong with the configuration or the datasets that it names,
# before torchrun adds its traceback to it. CHECK_CONFIG=0 leaves this out.
launch_check() {
  [[ ${CHECK_CONFIG:-1} != 0 ]] || return 0
  "${PYTHON:-python}" -m opentau_train.tools.check "$@"
}

# launch_container: fill the array `container` with srun's options for CONTAINER_IMAGE: none where it isn't set. There is no
# scontrol in an image, so that MASTER_ADDR is looked up here.
launch_container() {
  container=()
  [[ -n ${CONTAINER_IMAGE:-} ]] || return 0
  local mounts="$OPENTAU_ROOT,$RUN_DIR,$LOG_DIR,$PWD" first
  [[ ${DATASET_PATH:-} != /* ]] || mounts+=",$DATASET_PATH"
  # shellcheck disable=SC2034 # the caller's
  container=("--container-image=$CONTAINER_IMAGE" "--container-workdir=$PWD"
    "--container-mounts=$mounts${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
  if [[ -z ${MASTER_ADDR:-} ]]; then
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    MASTER_ADDR=$(launch_node_address "${first%%$'\n'*}")
    export MASTER_ADDR
  fi
}

# launch_quote_value TEXT: print TEXT as a value of an override, in Hydra's quotes where it holds more than a plain path.
launch_quote_value() {
  local text=$1
  if ! [[ $text =~ ^[A-Za-z0-9_./:@%+-]+$ ]]; then
    text=${text//\\/\\\\}
    text="'${text//\'/\\\'}'"
  fi
  printf '%s' "$text"
}

# launch_torchrun LOG ARGUMENT...: run `torchrun [topology] -m opentau_train ARGUMENT...`, its output to stdout and
# appended to the file LOG, and return its status. TERM, INT, HUP and QUIT are handed on to torchrun, and waited for.
# Where torchrun isn't on PATH it is started as a module of PYTHON. What its agent adds to a mistake of the user is left
# out (screen.py).
# With RDZV_ID the nodes meet by torchrun's c10d rendezvous at MASTER_ADDR, in any order, else by its static one.
launch_torchrun() {
  local log=$1 torchrun command
  shift
  launch_find_torchrun || return
  command=("${torchrun[@]}")
  [[ -z ${NPROC_PER_NODE:-} ]] || command+=(--nproc-per-node "$NPROC_PER_NODE")
  [[ -z ${NNODES:-} ]] || command+=(--nnodes "$NNODES")
  if [[ -n ${RDZV_ID:-} ]]; then
    # is_host: by itself torchrun compares host names, and no node is the host when MASTER_ADDR is an alias.
    local is_host=$((${NODE_RANK:-0} == 0))
    command+=(--rdzv-backend c10d --rdzv-id "$RDZV_ID" --rdzv-endpoint "${MASTER_ADDR:-127.0.0.1}:${MASTER_PORT:-29500}"
      --rdzv-conf "is_host=$is_host")
    # Any node may become torchrun's first one and give its address to the others.
    [[ -z ${LOCAL_ADDR:-} ]] || command+=(--local-addr "$LOCAL_ADDR")
  else
    [[ -z ${NODE_RANK:-} ]] || command+=(--node-rank "$NODE_RANK")
    [[ -z ${MASTER_ADDR:-} ]] || command+=(--master-addr "$MASTER_ADDR")
    [[ -z ${MASTER_PORT:-} ]] || command+=(--master-port "$MASTER_PORT")
  fi
  command+=(-m opentau_train "$@")
  if ! mkdir -p -- "$(dirname -- "$log")" || ! : >>"$log"; then
    launch_fail "can't write the log $log" "the environment variable LOG_DIR" "set LOG_DIR to a directory you can write"
    return
  fi

  # What reads its output ignores the signals: it must outlive torchrun to take down how it ended.
  local output tee screen=(cat) script=${BASH_SOURCE[0]%/*}/screen.py
  ! command -v -- "${PYTHON:-python}" >/dev/null || [[ ! -f $script ]] || screen=("${PYTHON:-python}" -I "$script")
  exec {output}> >(trap '' TERM INT HUP QUIT && "${screen[@]}" | tee -a -- "$log")
  tee=$!
  { printf '+' && printf ' %q' "${command[@]}" && printf '\n'; } >&"$output"

  local status=0 child='' signal='' caught='' monitor=+m traps
  traps=$(trap -p TERM INT HUP QUIT)
  for signal in TERM INT HUP QUIT; do
    # shellcheck disable=SC2064 # $signal is this turn's
    trap "caught=$signal; "'[[ -z $child ]] || kill -s "$caught" -- "$child" 2>/dev/null || :' "$signal"
  done
  # Job control for this one start: without it a shell starts background commands with INT and QUIT ignored.
  [[ $- != *m* ]] || monitor=-m
  set -m
  "${command[@]}" >&"$output" 2>&1 {output}>&- </dev/null &
  child=$!
  set "$monitor"
  exec {output}>&-
  [[ -z $caught ]] || kill -s "$caught" -- "$child" || : # it came before there was a child to hand it to
  while :; do
    caught='' status=0
    wait "$child" || status=$?
    # A trap ends `wait` early, with a status that is not torchrun's.
    [[ -n $caught ]] || break
  done
  wait "$tee" || :
  trap - TERM INT HUP QUIT
  eval "$traps" # as `trap -p` printed them: the caller's own
  return "$status"
}
