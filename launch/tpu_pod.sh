#!/usr/bin/env bash
# Trains on a TPU pod: creates it, installs this checkout's last commit on all workers, starts
# training on each, follows the log of the first, and begins again after a pre-emption.
#
#   launch/tpu_pod.sh --name=NAME --zone=ZONE --type=v5litepod-16 [--version=SOFTWARE] [--spot]
#       [--project=PROJECT] [--max-restarts=20] [--dry-run]
#       -- --config=configs/pretrain.py --workdir=gs://BUCKET/runs/pretrain [...]
#   launch/tpu_pod.sh --name=NAME --zone=ZONE [--project=PROJECT] [--dry-run] --delete
#
# What follows -- goes to launch/train.py on every worker. Buckets named there as gs://BUCKET/... are
# mounted on every worker as /mnt/gs/BUCKET. The same command follows a training that goes on.
# --dry-run prints the commands and runs none of them.
set -euo pipefail

GCSFUSE_VERSION=${GCSFUSE_VERSION:-3.0.0}
PAUSE=${TPU_POD_PAUSE:-30} # seconds between two looks at the pod
PATIENCE=5                 # looks that may fail one after the other
INTERRUPTED=75             # launch/train.py's status when the same command will go on later
INSTALL_ATTEMPTS=5         # a worker that has just become ready may not take connections yet
FOLDER=colbert_jax_launch  # in each worker's home folder; made anew at each start

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 2
}

stop() {
  say "error: $*"
  exit 1
}

# Prints words as a shell reads them back.
quoted() {
  local word text="" mark="'\"'\"'"
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      text+=" $word"
    else
      text+=" '${word//"'"/$mark}'"
    fi
  done
  printf '%s\n' "${text# }"
}

run() {
  if [[ -n $dry_run ]]; then quoted "$@"; else "$@"; fi
}

explain() {
  if [[ -n $dry_run ]]; then printf '\n# %s\n' "$*"; else say "$*"; fi
}

# --- what is asked for ---

name="" zone="" kind="" version="" project="" spot="" delete="" dry_run="" max_restarts=20
arguments=()
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) kind=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --max-restarts=*) max_restarts=${1#*=} ;;
    --spot) spot=yes ;;
    --delete) delete=yes ;;
    --dry-run) dry_run=yes ;;
    --help)
      sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
      exit
      ;;
    --)
      shift
      arguments=("$@")
      break
      ;;
    --name | --zone | --type | --version | --project | --max-restarts)
      fail "$1 has no value: flags are written $1=value."
      ;;
    *) fail "'$1' is no flag of tpu_pod.sh: what is meant for launch/train.py comes after --." ;;
  esac
  shift
done

[[ -n $name ]] || fail "--name is missing: see launch/tpu_pod.sh --help."
[[ -n $zone ]] || fail "--zone is missing: see launch/tpu_pod.sh --help."
[[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
  fail "--name=$name: a pod's name has small letters, digits and -, and begins with a letter."
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] ||
  fail "--zone=$zone: a zone looks like us-west4-a."
[[ $max_restarts =~ ^[0-9]+$ ]] || fail "--max-restarts=$max_restarts is no whole number."
where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
errors=""
buckets=()

if [[ -z $delete ]]; then
  [[ -n $kind ]] || fail "--type is missing: it says how large the pod is, such as v5litepod-16."
  if [[ -z $version ]]; then
    case $kind in
      v6e-*) version=v2-alpha-tpuv6e ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
      *) fail "--type=$kind is not known here: give --version, the TPU software that it needs." ;;
    esac
  fi
  config="" workdir=""
  for argument in ${arguments[@]+"${arguments[@]}"}; do
    case $argument in
      --config=*) config=${argument#*=} ;;
      --workdir=*) workdir=${argument#*=} ;;
    esac
  done
  [[ -n $config ]] || fail "--config is missing: give it after --, as launch/train.py takes it."
  [[ $workdir == gs://?* || $workdir == /* ]] ||
    fail "--workdir has to be storage that all workers share: give --workdir=gs://... after --."
  git -C "$root" cat-file -e "HEAD:${config%%:*}" 2>/dev/null ||
    fail "--config=$config is not in the last commit, which is what the pod gets: commit it."

  # A run opens files; a bucket becomes files by being mounted, at the same place on every worker.
  for i in "${!arguments[@]}"; do
    rest=${arguments[i]}
    while [[ $rest =~ gs://([a-z0-9][a-z0-9._-]*)(.*) ]]; do
      [[ " ${buckets[*]-} " == *" ${BASH_REMATCH[1]} "* ]] || buckets+=("${BASH_REMATCH[1]}")
      rest=${BASH_REMATCH[2]}
    done
    arguments[i]=${arguments[i]//gs:\/\///mnt/gs/}
  done
elif ((${#arguments[@]})); then
  fail "--delete trains nothing: leave out -- and what follows it."
fi

if [[ -z $dry_run ]]; then
  command -v gcloud >/dev/null || fail "gcloud is not installed: see cloud.google.com/sdk."
  errors=$(mktemp)
  trap 'rm -f "$errors"' EXIT
fi

# --- the pod ---

on_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --quiet "--worker=$1" "--command=$2"
}

# Sets `state`: NOT_FOUND where there is no such thing, UNREACHABLE where gcloud could not say.
reached=""
failures=0
look() {
  local format='value(state)'
  [[ $1 == tpu-vm ]] || format='value(state.state)'
  if state=$(gcloud compute tpus "$1" describe "$name" "${where[@]}" "--format=$format" \
    2>"$errors"); then
    reached=yes failures=0
  elif grep -q NOT_FOUND "$errors"; then
    state=NOT_FOUND reached=yes failures=0
  else
    state=UNREACHABLE failures=$((failures + 1))
    if [[ -z $reached ]] || ((failures >= PATIENCE)); then
      cat "$errors" >&2
      stop "gcloud does not say what state $name is in; a training that has begun goes on."
    fi
  fi
}

create_pod() {
  local command=(gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${where[@]}"
    "--accelerator-type=$kind" "--runtime-version=$version" --quiet)
  [[ -z $spot ]] || command+=(--spot)
  explain "Ask for the pod $name, and wait until there is room for it."
  run "${command[@]}"
  if [[ -n $dry_run ]]; then
    # shellcheck disable=SC2016 # to be read by the shell that this is pasted into
    printf 'until [ "$(%s)" = ACTIVE ]; do sleep %s; done\n' \
      "$(quoted gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
        '--format=value(state.state)')" "$PAUSE"
  fi
}

delete_pod() {
  if [[ -z $dry_run ]]; then look queued-resources; else state=ACTIVE; fi
  if [[ $state == NOT_FOUND ]]; then # made by hand, without a queue
    run gcloud compute tpus tpu-vm delete "$name" "${where[@]}" --quiet
  else
    run gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
  fi
}

restarts=0
again() {
  restarts=$((restarts + 1))
  ((restarts <= max_restarts)) || stop "$1 once more; --max-restarts=$max_restarts are used up."
  say "$1: starting again ($restarts of at most $max_restarts)."
}

# Returns when the pod is ready, however long that takes.
ready_pod() {
  while true; do
    look tpu-vm
    case $state in
      READY) return ;;
      PREEMPTED | TERMINATED | STOPPED)
        again "The pod $name is $state"
        delete_pod
        continue
        ;;
      NOT_FOUND)
        look queued-resources
        case $state in
          NOT_FOUND)
            create_pod
            continue
            ;;
          SUSPENDED)
            again "The pod $name is $state"
            delete_pod
            continue
            ;;
          FAILED)
            quoted gcloud compute tpus queued-resources describe "$name" "${where[@]}" >&2
            stop "the request for $name has failed: the command above says why; then --delete it."
            ;;
        esac
        ;;
    esac
    say "$name: $state"
    sleep "$PAUSE"
  done
}

# --- training on it ---

# The workers' Python may be older than this package takes, so that uv brings one.
install() {
  local archive="build/$FOLDER.tar.gz" bucket mount command
  explain "Copy the last commit to all workers, and install it."
  run mkdir -p build || return
  run git archive --format=tar.gz "--output=$archive" HEAD || return
  run gcloud compute tpus tpu-vm scp "$archive" "$name:$FOLDER.tar.gz" "${where[@]}" --quiet \
    --worker=all || return
  # What is left of an earlier training would keep the chips.
  command="{ [ ! -f $FOLDER/train.pid ] || kill -9 -- \"-\$(cat $FOLDER/train.pid)\" 2>/dev/null; };"
  command+=" rm -rf $FOLDER && mkdir $FOLDER && tar -xzf $FOLDER.tar.gz -C $FOLDER && cd $FOLDER"
  command+=" && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv"
  command+=" && python3 -m uv venv --quiet --python 3.12 .venv"
  command+=" && python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu]'"
  on_workers all "$command" || return
  for bucket in ${buckets[@]+"${buckets[@]}"}; do
    mount=/mnt/gs/$bucket
    explain "Mount the bucket $bucket on all workers as $mount."
    command="command -v gcsfuse >/dev/null || { curl -fsSL -o gcsfuse.deb"
    command+=" https://github.com/GoogleCloudPlatform/gcsfuse/releases/download"
    command+="/v$GCSFUSE_VERSION/gcsfuse_${GCSFUSE_VERSION}_amd64.deb"
    command+=" && sudo apt-get install -qq -y -o DPkg::Lock::Timeout=300 ./gcsfuse.deb; }"
    # A checkpoint's folder is renamed when it is whole, and every host has to see it at once.
    command+=" && { mountpoint -q $mount || { sudo mkdir -p $mount && sudo chown \"\$(id -u)\" $mount"
    command+=" && gcsfuse --implicit-dirs --rename-dir-limit=200000 --metadata-cache-ttl-secs=0"
    command+=" --metadata-cache-negative-ttl-secs=0 $bucket $mount; }; }"
    on_workers all "$command" || return
  done
}

# Its own session, so that it outlives the connection, and can be ended with all its children.
start() {
  local command
  command="cd $FOLDER && { COLBERT_JAX_HOSTS=auto setsid bash -c"
  command+=" '.venv/bin/python launch/train.py \"\$@\"; echo \$? > train.status'"
  command+=" train $(quoted "${arguments[@]}") > train.log 2>&1 < /dev/null &"
  command+=" echo \$! > train.pid; }"
  explain "Start training on all workers."
  on_workers all "$command"
}

# Sets `training`, as worker 0 says: running, none, its exit status, or unreachable.
look_at_training() {
  local command answer
  command="cd $FOLDER 2>/dev/null; if [ -s train.status ]; then echo training=\$(cat train.status);"
  command+=" elif [ -f train.pid ] && kill -0 \$(cat train.pid) 2>/dev/null;"
  command+=" then echo training=running; else echo training=none; fi"
  answer=$(on_workers 0 "$command" 2>/dev/null) || answer=""
  training=$(sed -n 's/^training=//p' <<<"$answer")
  training=${training:-unreachable}
}

follow_command() {
  # shellcheck disable=SC2016 # ... and this by worker 0's
  printf 'cd %s && tail -n %s -F train.log --pid=$(cat train.pid)' "$FOLDER" "$1"
}

# Shows worker 0's log until training ends or the pod is lost; sets `training` as above.
follow() {
  local lines=+1
  explain "Follow the log of the first worker."
  while true; do
    on_workers 0 "$(follow_command "$lines")" || true
    lines=20
    look_at_training
    case $training in
      0 | none) return ;;
      running) ;;
      unreachable)
        look tpu-vm
        [[ $state == READY || $state == UNREACHABLE ]] || return 0
        say "Worker 0 of $name cannot be reached; trying again."
        ;;
      *) # Where one worker is pre-empted, the others fail first.
        sleep "$PAUSE"
        look tpu-vm
        [[ $state == READY || $state == UNREACHABLE ]] || training=unreachable
        return 0
        ;;
    esac
    sleep "$PAUSE"
  done
}

run cd "$root"
if [[ -n $delete ]]; then
  delete_pod
  exit
fi
git -C "$root" diff --quiet HEAD -- || say "Note: the pod gets the last commit, without your later changes."

if [[ -n $dry_run ]]; then
  create_pod
  install
  start
  explain "Follow the log of the first worker."
  on_workers 0 "$(follow_command +1)"
  explain "After a pre-emption, at most $max_restarts times: this, and all of the above again."
  printf '# %s\n' "$(delete_pod)"
  exit
fi

trap 'say "Training goes on: the same command follows it again, --delete removes the pod."; exit 130' INT
attempts=0
while true; do
  ready_pod
  look_at_training
  if [[ $training == running ]]; then
    say "A training that was started before goes on: following it, with the flags that it has."
  elif [[ $training != unreachable ]] && install && start; then # what goes on there must not be hurt
    attempts=0
  else
    attempts=$((attempts + 1))
    ((attempts < INSTALL_ATTEMPTS)) ||
      stop "this checkout could not be installed and started on all workers of $name."
    sleep "$PAUSE"
    continue
  fi
  follow
  case $training in
    0)
      say "Training has finished. Remove the pod: launch/tpu_pod.sh $(
        quoted "--name=$name" "${where[@]}" --delete
      )"
      exit 0
      ;;
    none) again "Training is gone from worker 0, without an exit status" ;;
    "$INTERRUPTED") again "Training was asked to stop, and has saved what it had done" ;;
    unreachable) ;; # `ready_pod` sees to it
    *)
      say "error: training has ended with status $training; the other workers' last lines:"
      on_workers all "tail -n 20 $FOLDER/train.log" || true
      exit "$training"
      ;;
  esac
done
