#!/usr/bin/env bash
# Trains on a TPU slice of GKE, as launch/gke_jobset.yaml says: makes the image, starts the hosts, and
# follows the first one's log.
#
#   launch/gke.sh --image=IMAGE --bucket=BUCKET [--build] [--check] [--dry-run]
#   launch/gke.sh --delete [--dry-run]
#
# --build makes IMAGE from launch/Dockerfile and pushes it first. --check has the cluster look at the
# set without starting it. --delete ends it. --dry-run prints the commands and runs none of them. The
# run's own flags, the slice and the number of hosts stand in the YAML.
set -euo pipefail

say() { printf '%s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 2
}

image="" bucket="" build="" check="" delete="" dry_run=""
while (($#)); do
  case $1 in
    --image=*) image=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --build) build=yes ;;
    --check) check=yes ;;
    --delete) delete=yes ;;
    --dry-run) dry_run=yes ;;
    --help)
      sed -n '2,/^set /{/^#/s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}"
      exit
      ;;
    *) fail "'$1' is no flag of gke.sh: see launch/gke.sh --help." ;;
  esac
  shift
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
set_name=$(sed -n '/^metadata:/,/^spec:/s/^  name: //p' launch/gke_jobset.yaml)

# Runs a command given as one line of shell, or prints the line.
run() {
  if [[ -n $dry_run ]]; then printf '%s\n' "$1"; else eval "$1"; fi
}

need() {
  [[ -n $dry_run ]] || command -v "$1" >/dev/null || fail "there is no $1 on PATH: $2."
}

need kubectl "install it and point it at the cluster"
if [[ -n $delete ]]; then
  [[ -z $image$bucket$build$check ]] || fail "--delete takes no other flag but --dry-run."
  run "kubectl delete jobset $set_name"
  exit
fi

# Both go into a shell line and into YAML, so they are what such names may be and nothing else.
[[ -n $image ]] || fail "--image is missing: see launch/gke.sh --help."
[[ $image =~ ^[a-z0-9][a-zA-Z0-9._/:@-]*$ ]] || fail "--image=$image is no name of an image."
[[ -n $bucket ]] || fail "--bucket is missing: see launch/gke.sh --help."
[[ $bucket =~ ^[a-z0-9][a-z0-9._-]*$ ]] || fail "--bucket=$bucket is no bucket's name, without gs://."
need envsubst "it comes with gettext"

if [[ -n $build ]]; then
  need docker "leave out --build where the image is pushed already"
  run "docker build -f launch/Dockerfile --build-arg EXTRA=tpu -t $image ."
  run "docker push $image"
fi
apply="IMAGE=$image BUCKET=$bucket envsubst '\$IMAGE \$BUCKET' < launch/gke_jobset.yaml | kubectl apply"
if [[ -n $check ]]; then
  run "$apply --dry-run=server -f -"
  exit
fi
run "$apply -f -"
# The first host of the set; its pod takes a while to be there, and a node for it longer.
first="--selector=jobset.sigs.k8s.io/jobset-name=$set_name"
first+=",batch.kubernetes.io/job-completion-index=0"
run "until kubectl get pods $first -o name | grep -q .; do sleep 5; done"
run "kubectl wait --for=condition=Ready --timeout=30m pod $first"
run "kubectl logs --follow --tail=-1 $first"
