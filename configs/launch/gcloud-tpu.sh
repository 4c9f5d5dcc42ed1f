#!/usr/bin/env bash
# The whole job (training, exports, answers, scores, probes) on all hosts of a Cloud TPU slice, with nothing but gcloud.
#   PROJECT=my-project ZONE=us-west4-a DATA=gs://my-bucket/records OUT=gs://my-bucket/runs configs/launch/gcloud-tpu.sh create
#   ... configs/launch/gcloud-tpu.sh run       starts or continues the job; after a preemption: create, then run again
#   ... configs/launch/gcloud-tpu.sh logs      follows the first host
#   ... configs/launch/gcloud-tpu.sh delete    gives the slice back (it costs money until then)
#
# NAME, TYPE, VERSION, RECIPE, REPO and MORE may be set as well, see below. Every host must see the run directory: OUT is
# mounted with Cloud Storage FUSE, for that is where checkpoints go and where a run on a new slice finds them.
set -euo pipefail
usage() { sed -n '2,/^set/p' "$0" | sed '$d' >&2; exit 2; }
[ $# = 1 ] || usage

: "${PROJECT:?set PROJECT to your Google Cloud project}" "${ZONE:?set ZONE, e.g. us-west4-a}"
NAME=${NAME:-mentalglm}
TYPE=${TYPE:-v5litepod-16}                     # v5litepod-8, v6e-8, v5p-8, ...
VERSION=${VERSION:-v2-alpha-tpuv5-lite}        # v2-alpha-tpuv6e for v6e, v2-alpha-tpuv5 for v5p
RECIPE=${RECIPE:-configs/tpu-v5e-16-32k.yaml}
REPO=${REPO:-$(git config --get remote.origin.url)}
MORE=${MORE:-mesh.distributed=true}            # one more value of the recipe, e.g. probe.posts=0: the first host probes
tpu=(gcloud compute tpus tpu-vm)
where=(--project "$PROJECT" --zone "$ZONE")

on_all() {  # the same program on every host: JAX finds the others through the slice's metadata
  "${tpu[@]}" ssh "$NAME" "${where[@]}" --worker=all --command "$1"
}

case "$1" in
  create)
    "${tpu[@]}" create "$NAME" "${where[@]}" --accelerator-type "$TYPE" --version "$VERSION" ${SPOT:+--spot}
    ;;
  run)
    : "${DATA:?set DATA to gs://BUCKET/PATH of the records}" "${OUT:?set OUT to gs://BUCKET/PATH for the runs}"
    path=${OUT#gs://}; bucket=${path%%/*}; folder=${path#*/}
    name=$(basename "$RECIPE" .yaml)
    on_all "
      set -e
      command -v ~/.local/bin/uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh  # the image has Python 3.10
      [ -d mentalglm-jax ] || git clone -q '$REPO' mentalglm-jax
      cd mentalglm-jax
      [ -d .venv ] || ~/.local/bin/uv venv -q --python 3.11 .venv
      ~/.local/bin/uv pip install -q --python .venv/bin/python --torch-backend cpu -c constraints.txt -e '.[tpu,probes]'
      mkdir -p ~/records ~/runs
      gcloud storage rsync -r '$DATA' ~/records
      mountpoint -q ~/runs || gcsfuse --implicit-dirs --only-dir '$folder' '$bucket' ~/runs
      nohup .venv/bin/mentalglm run '$RECIPE' --set data.root=\$HOME/records --set run_dir=\$HOME/runs/$name \\
        --set mesh.distributed=true --set '$MORE' >run.log 2>&1 </dev/null &"
    ;;
  logs)
    "${tpu[@]}" ssh "$NAME" "${where[@]}" --worker=0 --command 'tail -n 50 -f mentalglm-jax/run.log'
    ;;
  delete)
    "${tpu[@]}" delete "$NAME" "${where[@]}" --quiet
    ;;
  *)
    usage
    ;;
esac
