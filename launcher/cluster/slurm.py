"""A batch script for Slurm: Ray on the job's nodes, one run on it, and the run's exit code as the job's."""

from __future__ import annotations

import math
import re
import shlex

from launcher.cluster.keeper import PATIENCE
from launcher.cluster.ray_yaml import RAISE_OPEN_FILES
from launcher.recipe.load import LoadedRecipe
from launcher.units import parse_seconds

MARGIN_S = 35
"""Between the signal and the end of the job, besides `checkpoint.grace`: for Ray and the launcher to end."""
JOIN_S = 300

_SCRIPT = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
{gpus}#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:TERM@{signal_s}
# Add --partition, --account and --time as your cluster wants them.
#
# Every start goes on with the run in its folder, which all nodes must see. When the time is over or the job is
# preempted, Slurm sends SIGTERM {signal_s} s before the end: the run saves, and the job is put into the queue again.
set -euo pipefail

python={python}
recipe={recipe}
run_dir={run_dir}
export PATH="${{python%/*}}:$PATH" {environment}
# Private to this job, in memory on each node; its value is in no environment and no command line.
export RAY_AUTH_TOKEN_PATH="/dev/shm/slipway-$SLURM_JOB_ID.token"
port=$((20000 + SLURM_JOB_ID % 10000))

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# As the last node sees it: on its own host a name may mean 127.0.1.1.
address=$(srun --nodes=1 --ntasks=1 --nodelist="${{nodes[-1]}}" getent ahostsv4 "${{nodes[0]}}")
address=${{address%% *}}
token=$("$python" -c 'import secrets; print(secrets.token_hex(32))')

# Started on every node; the token comes on its input. "$@" is what differs between head and workers. noclobber: the
# file's name can be guessed, and one that somebody else has made there before would be his.
# shellcheck disable=SC2016
node='umask 077; set -o noclobber; rm -f "$RAY_AUTH_TOKEN_PATH"; cat > "$RAY_AUTH_TOKEN_PATH" || exit 1
trap "rm -f $RAY_AUTH_TOKEN_PATH" EXIT
{open_files}
ray start --block --disable-usage-stats --node-name="$SLURMD_NODENAME" {num_gpus}"$@"'
step=(srun --overlap --cpu-bind=none --kill-on-bad-exit=0 --ntasks-per-node=1)

"${{step[@]}}" --nodes=1 --nodelist="${{nodes[0]}}" bash -c "$node" ray --head --node-ip-address="$address" \\
  --port="$port" --dashboard-host=127.0.0.1 --temp-dir="/tmp/ray-$SLURM_JOB_ID" <<< "$token" &
if ((${{#nodes[@]}} > 1)); then
  "${{step[@]}}" --nodes=$((${{#nodes[@]}} - 1)) --exclude="${{nodes[0]}}" bash -c "$node" ray \\
    --address="$address:$port" <<< "$token" &
fi
unset token

members=$("$python" -m launcher.cluster.members "$address:$port" {join_s} "${{nodes[@]}}")
for node in "${{nodes[@]}}"; do
  if [[ $members != *"\\"name\\": \\"$node\\""* ]]; then
    echo "error: $node has not joined within {join_s} s" >&2
    exit 1
  fi
done

ended=0
"$python" -m launcher run --address "$address:$port" --resume auto --run-dir "$run_dir" -- "$recipe" &
run=$!
trap 'ended=1; kill -TERM "$run"' TERM
code=0
wait "$run" || code=$?
while kill -0 "$run" 2> /dev/null; do  # the signal has ended the first wait
  code=0
  wait "$run" || code=$?
done
if ((ended && code == 143)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def batch_script(
    loaded: LoadedRecipe, recipe: str, run_dir: str, name: str, python: str, nodes: int, gpus: int | None
) -> str:
    """The script as text, for `nodes` whole nodes; `gpus` is a node's number of GPUs, None for what it has."""
    environment = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"} | PATIENCE
    return _SCRIPT.format(
        name=re.sub(r"[^A-Za-z0-9_.-]+", "-", name),
        nodes=nodes,
        gpus=f"#SBATCH --gpus-per-node={gpus}\n" if gpus else "",
        num_gpus="" if gpus is None else f"--num-gpus={gpus} ",
        signal_s=math.ceil(parse_seconds(loaded.recipe.checkpoint.grace)) + MARGIN_S,
        python=shlex.quote(python),
        recipe=shlex.quote(recipe),
        run_dir=shlex.quote(run_dir),
        environment=" ".join(f"{key}={value}" for key, value in environment.items()),
        join_s=JOIN_S,
        open_files=RAISE_OPEN_FILES,
    )
