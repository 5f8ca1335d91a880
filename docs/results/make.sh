#!/bin/sh
# The tables of docs/EVIDENCE.md, from the records beside this file. From the root of a clone:
#
#     sh docs/results/make.sh                      # the page, from the records
#     sh docs/results/make.sh measure              # all records anew, and the page; takes hours
#     sh docs/results/make.sh measure camvid_112   # one record anew, and the page
#
# The commands below are those that a reader would type. `photos` is a folder with the photographs of docs/results/held_out.csv,
# `data` has the labelled sets (docs/PROBE.md), and JAFAR_REPO is a clone of JAFAR (docs/PEERS.md). A command whose record is not in
# records/ has not been carried out yet.
set -e
out=runs/evidence

# record NAME COMMAND...: carries the command out, and keeps what the table needs of its results
record() {
    name=$1
    shift
    if [ -z "$only" ] || [ "$only" = "$name" ]; then
        "$@" --output "$out/$name"
        python tests/measure/evidence.py keep "$out/$name" "docs/results/records/$name.json" --command "$@"
    fi
}

if [ "$1" = measure ]; then
    only=$2
    mkdir -p docs/results/records
    jafar=docs/peers/jafar.py

    record fidelity_112 brixel benchmark --compare-highres --checkpoint dinov2_vits14 --images photos --max-images 10 --seconds 8 --baseline $jafar:jafar
    record fidelity_224 brixel benchmark --compare-highres --checkpoint dinov2_vits14_x2 --images photos --max-images 10 --seconds 8 --baseline $jafar:jafar
    record fidelity_112_guided brixel benchmark --compare-highres --checkpoint dinov2_vits14 --images photos --max-images 10 --seconds 90 --baseline $jafar:jafar --baseline $jafar:jafar_448
    record dubai_aerial_112 brixel probe --recipe dubai_aerial --data data/dubai_aerial --res 112 --checkpoint dinov2_vits14 --quick --seeds 2 --baseline $jafar:jafar
    record dubai_aerial_112_finetuned brixel probe --recipe dubai_aerial --data data/dubai_aerial --res 112 --checkpoint dinov2_vits14 --quick --seeds 2 --source finetuned --set supervised.steps=60 --set supervised.batch_size=4 --set supervised.validate_every=10
    record dubai_aerial_112_unet brixel probe --recipe dubai_aerial --data data/dubai_aerial --res 112 --checkpoint dinov2_vits14 --quick --seeds 2 --source unet:resnet18 --set supervised.steps=300 --set supervised.batch_size=4 --set supervised.validate_every=30
    record chasedb1_112 brixel probe --recipe chasedb1 --data data/chasedb1 --res 112 --checkpoint dinov2_vits14 --quick --seeds 2 --baseline $jafar:jafar
    record camvid_112 brixel probe --recipe camvid --data data/camvid --res 112 --checkpoint dinov2_vits14 --quick --seeds 2 --source backbone --source student --source teacher --baseline $jafar:jafar
    record davis2016_112 brixel probe --task propagation --data data/davis2016 --res 112 --checkpoint dinov2_vits14 --set 'data.evaluate.only=JPEGImages/480p/[bc]*/0000?.jpg' --baseline $jafar:jafar
fi
python tests/measure/evidence.py table docs/results/records docs/EVIDENCE.md
