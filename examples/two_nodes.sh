#!/bin/sh
# Two "machines" on one Linux machine, to try a run over a network: two network namespaces with a cable between them.
# Needs root and iproute2.
#
#   sh examples/two_nodes.sh up
#   sh examples/two_nodes.sh node 0 --out /tmp/run & sh examples/two_nodes.sh node 1 --out /tmp/run
#   sh examples/two_nodes.sh cut     # pulls the cable
#   sh examples/two_nodes.sh kill 1  # as if node 1 lost its power
#   sh examples/two_nodes.sh down
set -e
command=$1
shift
case $command in
up)
    for n in 0 1; do
        ip netns add node$n
        ip -n node$n link set lo up
    done
    ip link add eth-node0 netns node0 type veth peer name eth-node1 netns node1
    for n in 0 1; do
        ip -n node$n addr add 10.77.0.$((n + 1))/24 dev eth-node$n
        ip -n node$n link set eth-node$n up
    done
    ;;
node)
    n=$1
    shift
    GLOO_SOCKET_IFNAME=eth-node$n exec ip netns exec node$n torchrun --nnodes 2 --nproc-per-node 1 --node-rank "$n" \
        --master-addr 10.77.0.1 --master-port 29500 -m dmjd pretrain digits --device cpu --encoder vit_tiny_patch8 \
        --steps 4000 --batch-size 32 --checkpoint-every 20 --eval-every 0 --no-final-eval --no-report "$@"
    ;;
cut) ip -n node0 link set eth-node0 down ;;
kill) ip netns pids "node$1" | xargs -r kill -9 ;;
down) for n in 0 1; do ip netns del node$n; done ;;
esac
