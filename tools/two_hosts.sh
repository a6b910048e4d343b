#!/usr/bin/env bash
# Two hosts on one machine: two network namespaces with a cable between them, a process of one
# training in each. Compares their losses with those of one process, then kills one of the two.
# Needs Linux, root, iproute2 and procps. PYTHON names the interpreter that has Etude.
set -euo pipefail

PYTHON=${PYTHON:-.venv/bin/python}
PYTHON=$(realpath -s "$PYTHON")
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
one=etude-one-$$ other=etude-other-$$
work=$(mktemp -d)
pids=()

clean() {
    for pid in "${pids[@]}"; do kill -KILL "$pid" 2>/dev/null || true; done
    for host in "$one" "$other"; do ip netns delete "$host" 2>/dev/null || true; done
    rm -rf "$work"
}
trap clean EXIT

ip netns add "$one"
ip netns add "$other"
ip link add v1 netns "$one" type veth peer name v2 netns "$other"
ip -n "$one" address add 10.77.0.1/24 dev v1
ip -n "$other" address add 10.77.0.2/24 dev v2
for host in "$one" "$other"; do ip -n "$host" link set lo up; done
ip -n "$one" link set v1 up
ip -n "$other" link set v2 up

cd "$work"
"$PYTHON" - <<'END'
import json
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from etude.models import loading

tokenizer = AutoTokenizer.from_pretrained(loading.locate(loading.SAMPLE), local_files_only=True)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    tie_word_embeddings=True, initializer_range=0.2,
)
LlamaForCausalLM(config).save_pretrained("tiny")
tokenizer.save_pretrained("tiny")
with open("rows.jsonl", "w") as file:
    for n in range(161):  # 20 steps of 8 rows, and one row that only one of two processes gets
        row = {"prompt": f"Question {n}?", "completion": "Because " * (1 + n % 7) + f"{n}."}
        file.write(json.dumps(row) + "\n")
END
cat > config.yml <<'END'
model: {name: ./tiny, dtype: float32}
lora: {r: 8, alpha: 16}
dataset: {train: rows.jsonl, validation: null, validation_split: 0, test: null, max_length: 128}
training: {use_cpu: true, learning_rate: 0.01, num_epochs: 1, logging_steps: 1}
END

# host NAMESPACE INTERFACE RANK RUN [KEY=VALUE]: the training as one would start it on that host
host() {
    GLOO_SOCKET_IFNAME=$2 exec ip netns exec "$1" "$PYTHON" -m torch.distributed.run --nnodes 2 \
        --nproc_per_node 1 --node_rank "$3" --master_addr 10.77.0.1 --master_port 29511 \
        -m etude.train_with_config config.yml "output.dir=$4" "${@:5}"
}

echo "== one process"
"$PYTHON" -m etude.train_with_config config.yml output.dir=alone > alone.log 2>&1
tail -n 3 alone.log

echo "== two hosts, 10.77.0.1 and 10.77.0.2"
host "$one" v1 0 shared > one.log 2>&1 & pids+=($!)
host "$other" v2 1 shared > other.log 2>&1 & pids+=($!)
wait "${pids[0]}" && wait "${pids[1]}" || { cat one.log other.log; exit 1; }
echo "host 10.77.0.1 said:"; tail -n 3 one.log
echo "host 10.77.0.2 said ($(wc -l < other.log) lines):"; cat other.log
"$PYTHON" - <<'END'
from pathlib import Path
from etude.runs.manifest import read_metrics

first, second = (
    {
        (line["step"], kind): line[kind]
        for line in read_metrics(Path(run) / "metrics.jsonl")
        for kind in ("loss", "eval_loss")
        if kind in line
    }
    for run in ("alone", "shared")
)
assert first.keys() == second.keys() and len(first) == 21, (first, second)
worst = max(abs(first[key] - second[key]) / first[key] for key in first)
print(f"{len(first)} losses, worst relative difference {worst:.2g}")
assert worst < 1e-5
END

echo "== the same, and the process on 10.77.0.2 is killed"
host "$one" v1 0 killed training.num_epochs=500 training.save_steps=5 > one.log 2>&1 & pids+=($!)
host "$other" v2 1 killed training.num_epochs=500 training.save_steps=5 > other.log 2>&1 & pids+=($!)
for _ in $(seq 600); do grep -q '^step 30/' one.log && break; sleep 0.1; done
grep -q '^step 30/' one.log || { cat one.log; exit 1; }
victim=$(pgrep -f -P "${pids[3]}" 'etude.train_with_config')
started=$(date +%s%N)
since() { printf '%d.%02d' $((($(date +%s%N) - started) / 10**9)) $((($(date +%s%N) - started) / 10**7 % 100)); }
kill -KILL "$victim"
for _ in $(seq 600); do grep -q '^error: ' one.log && break; sleep 0.1; done
echo "seconds until host 10.77.0.1 said so: $(since)"
grep '^error: ' one.log
status=0; wait "${pids[2]}" || status=$?
echo "seconds until its torchrun ended: $(since), exit code $status"
[ "$status" -ne 0 ]
