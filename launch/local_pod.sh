#!/usr/bin/env bash
# Trains in N processes on this machine's CPUs, joined as the hosts of a pod are.
#
#   launch/local_pod.sh N [--devices=K] [--dry-run] -- --config=... --workdir=... [...]
#
# Each process has K virtual devices, by default 1. What follows -- goes to launch/train.py. Lines
# begin with the number of the process that wrote them. The first process that fails stops the
# others, and its exit status is this program's.
set -euo pipefail

PYTHON=${PYTHON:-python}
GRACE=${LOCAL_POD_GRACE:-30} # seconds between asking a process to end and making it

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 2
}

count="" devices=1 dry_run=""
while (($#)); do
  case $1 in
    --devices=*) devices=${1#*=} ;;
    --dry-run) dry_run=yes ;;
    --help)
      sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
      exit
      ;;
    --)
      shift
      break
      ;;
    -*) fail "'$1' is no flag of local_pod.sh: what is meant for launch/train.py comes after --." ;;
    *)
      [[ -z $count ]] || fail "'$1' is one number too many: see launch/local_pod.sh --help."
      count=$1
      ;;
  esac
  shift
done
[[ -n $count ]] || fail "the number of processes is missing: see launch/local_pod.sh --help."
[[ $count =~ ^[1-9][0-9]*$ ]] || fail "'$count' is no number of processes."
[[ $devices =~ ^[1-9][0-9]*$ ]] || fail "--devices=$devices is no number of devices."
(($#)) || fail "nothing to train: give launch/train.py's flags after --."
command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON: activate an environment, or set PYTHON."

program=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/train.py
port=$("$PYTHON" -c 'import socket
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    print(free.getsockname()[1])')
export JAX_COORDINATOR_ADDRESS=127.0.0.1:$port JAX_NUM_PROCESSES=$count
# Accelerators cannot be shared by several processes; CPUs can.
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"

if [[ -n $dry_run ]]; then
  for ((i = 0; i < count; i++)); do
    command=(env "JAX_COORDINATOR_ADDRESS=$JAX_COORDINATOR_ADDRESS" "JAX_NUM_PROCESSES=$count"
      "JAX_PROCESS_ID=$i" "JAX_PLATFORMS=$JAX_PLATFORMS" "XLA_FLAGS=$XLA_FLAGS" "$PYTHON" "$program")
    printf '%s%s\n' "${command[*]@Q} ${*@Q}" "$( ((i == count - 1)) || echo ' &')"
  done
  exit
fi

# A progress bar goes back to the start of its line: each state of it becomes a line of its own.
printer='import os, re, sys
rest = b""
while chunk := os.read(0, 65536):
    *lines, rest = re.split(rb"[\r\n]", rest + chunk)
    for line in filter(None, lines):
        os.write(1, sys.argv[1].encode() + line + b"\n")
if rest:
    os.write(1, sys.argv[1].encode() + rest + b"\n")'
export TQDM_MININTERVAL=${TQDM_MININTERVAL:-5} # seconds between two states

# A group of its own for each process: its worker processes get what it gets, and Ctrl-C comes from
# here alone. (Without job control a shell starts processes in the background deaf to it.)
set -m
processes=() printers=()
for ((i = 0; i < count; i++)); do
  # The printers last until all is said, whatever signal comes.
  exec {output}> >(
    trap '' INT TERM HUP
    exec "$PYTHON" -c "$printer" "[$i] "
  )
  printers+=("$!")
  JAX_PROCESS_ID=$i "$PYTHON" "$program" "$@" >&"$output" 2>&1 </dev/null &
  processes+=("$!")
  exec {output}>&-
done
set +m

send() {
  local process
  for process in ${processes[@]+"${processes[@]}"}; do
    kill "-$1" -- "-$process" 2>/dev/null || true
  done
}

status=0
deadline=""
end_with() { # a status and a signal; the first time counts
  [[ -z $deadline ]] || return 0
  status=$1
  deadline=$((SECONDS + GRACE))
  send "$2"
}
trap 'end_with 130 INT' INT
trap 'end_with 143 TERM' TERM
trap 'end_with 129 HUP' HUP

while ((${#processes[@]})); do
  going=()
  for process in "${processes[@]}"; do
    if kill -0 "$process" 2>/dev/null; then
      going+=("$process")
      continue
    fi
    ended=0
    wait "$process" || ended=$?
    if ((ended)); then
      [[ -n $deadline ]] || say "A process has ended with status $ended: stopping the others."
      end_with "$ended" TERM
    fi
  done
  processes=(${going[@]+"${going[@]}"})
  # A process that waits for another in a collective may not hear what it is asked.
  if [[ -n $deadline ]] && ((SECONDS >= deadline)); then send KILL; fi
  sleep 0.2 || true
done
for printer in "${printers[@]}"; do
  wait "$printer" 2>/dev/null || true
done
exit "$status"
