"""A RunPod of one's own: the API, pods that are local processes, network volumes that are folders, their S3 side, prices and bills.

`python -m infra.runpod.emulator --folder DIR` serves it. A production run can be rehearsed on it for nothing, and every fault that users of
RunPod have met can be had on demand. Its answers are checked against RunPod's OpenAPI document in tests/infra/runpod.

    catalogue   what is on offer, and at which price
    containers  a pod's process: its root-like folder, environment, restarts, disk
    cloud       pods, volumes and bills
    faults      what can be made to go wrong
    server      the HTTP side
    s3          moto behind the operations that RunPod has, kept equal with the volume's folder
"""
