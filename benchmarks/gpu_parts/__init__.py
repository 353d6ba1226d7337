"""The parts of benchmarks/gpu.py; one concept a file.

    rows        what is recorded, and how it is kept             clock       how a call is timed
    place       the device, dtype and sizes of this run          ceilings    what this GPU reaches at best
    launches    which launch settings ran, and which failed      compare     error bounds, poisoned memory
    references  the mathematics in fp64                          checks*     correctness of every op and table row
    calls       forward, backward, both of a contender           cases*      what is timed, beside whom
    worker      runs units one after another                     supervise   survives a worker that crashes or hangs
    train       a whole training step, beside peers              bars        the demands, met or not met
"""
