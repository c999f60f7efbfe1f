#!/usr/bin/env bash
# Run the benchmarks, hours with nothing else running, and write what each prints into README.md.
#
#   benchmarks/all.sh               all
#   benchmarks/all.sh memory scale  these
#   benchmarks/all.sh --list        only print the commands
#
# NANOGPT and MINBPE are folders with clones of these repositories, SHAKESPEARE is the file of
# tiny Shakespeare, GPT and TEXT2IMAGE are trained runs, and so are CODE, DEEP and SHALLOW, on
# stdlib (speculative.py). A benchmark whose variable is not set is left out, and a line says so.
set -euo pipefail
cd "$(dirname "$0")/.."
list=false
if [[ ${1:-} == --list ]]; then
    list=true
    shift
fi
only=("$@")
found=false

# run NAME COMMAND...: the command's output goes into the block NAME, unless it records that itself.
run() {
    local name=$1
    shift
    if [[ ${#only[@]} -gt 0 && ! " ${only[*]} " == *" ${name%% *} "* ]]; then
        return
    fi
    found=true
    if [[ " $* " == *" - "* ]]; then
        echo "$name is left out: set what it needs"
        return
    fi
    echo "+ $name: $*"
    if [[ $list == true ]]; then
        return
    elif [[ " $* " == *" --record "* ]]; then
        "$@"
    else
        "$@" | tee /dev/stderr | python benchmarks/timing.py "$name"
    fi
}

run default_run python benchmarks/default_run.py
run ideas python benchmarks/ideas.py --record
run "nanogpt bytes" python benchmarks/nanogpt.py bytes "${NANOGPT:--}" "${SHAKESPEARE:--}" --record
run "nanogpt shakespeare" python benchmarks/nanogpt.py shakespeare "${NANOGPT:--}" "${SHAKESPEARE:--}" --rounds 2 --record
run "nanogpt throughput" python benchmarks/nanogpt.py throughput "${NANOGPT:--}" --rounds 2
run generation python benchmarks/generation.py --repeats 2
run "speculative code" python benchmarks/speculative.py code "${CODE:--}" --record
run "speculative draft" python benchmarks/speculative.py draft "${DEEP:--}" "${SHALLOW:--}" --record
run sounds python benchmarks/sounds.py
run patterns python benchmarks/patterns.py --record
run "quantize quality" python benchmarks/quantize.py quality "${GPT:--}" --record
run "quantize speed" python benchmarks/quantize.py speed --record
run suites python -m tinyfm.evaluate suites "${GPT:--}" --limit 500 --quantize int8 --run-code
run serve python benchmarks/serve.py --record
run serve_load python benchmarks/serve_load.py "${GPT:--}"
run tokenizer python benchmarks/tokenizer.py --text "${SHAKESPEARE:--}" --minbpe "${MINBPE:--}" --vocab-size 600
run retrieval python benchmarks/retrieval.py --record
run "clip speed" python benchmarks/clip.py speed --repeats 3
run "clip memory" python benchmarks/clip.py memory
run vision python benchmarks/vision.py --record
run "vision two" python benchmarks/vision.py --two --record
run "preference functions" python benchmarks/preference.py functions --record
run "preference films" python benchmarks/preference.py films --record
run together python benchmarks/together.py --record
run "encoder films" python benchmarks/encoder.py films --minutes 5 --record
run "encoder speed" python benchmarks/encoder.py speed --record
run "seq2seq words" python benchmarks/seq2seq.py words --record
run "seq2seq translation" python benchmarks/seq2seq.py translation --record
run "seq2seq speed" python benchmarks/seq2seq.py speed --record
run "diffusion train" python benchmarks/diffusion.py train
run "diffusion sample" python benchmarks/diffusion.py sample
run "text2image judge" python benchmarks/text2image.py judge --folds 7
run "text2image latents" python benchmarks/text2image.py latents
run "text2image samplers" python benchmarks/text2image.py samplers "${TEXT2IMAGE:--}" --guidance 3
run "text2image guidance" python benchmarks/text2image.py guidance "${TEXT2IMAGE:--}"
run letters python benchmarks/letters.py --picture benchmarks/letters.png --record
run prior python benchmarks/prior.py "${TEXT2IMAGE:--}" --record
run memory python benchmarks/memory.py
run step_time python benchmarks/step_time.py
run busy python benchmarks/busy.py --record
run scale python benchmarks/scale.py --steps 20
run prepare python benchmarks/prepare.py
run "budget sweep" python benchmarks/budget.py sweep --record
run "budget rates" python benchmarks/budget.py rates --record
run "budget check" python benchmarks/budget.py check --record
run alibi python benchmarks/alibi.py --picture benchmarks/alibi.png --record
run suite python benchmarks/suite.py --record
run gpu benchmarks/gpu.sh --record
if [[ $found == false ]]; then
    echo "there is no benchmark named ${only[*]}; --list shows them"
    exit 1
fi
