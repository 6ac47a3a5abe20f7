"""A local emulator of RunPod: the API, pods as local processes, network volumes as folders with an S3 API, prices and bills.

`fvlm speedrun --cloud emulator` rehearses a production run on it, free of charge. Every fault that users of RunPod have met can be injected
on demand. Its responses are checked against RunPod's OpenAPI document in tests/infra/runpod.

    catalogue   the machines on offer, and their prices
    containers  a pod's process: its root-like folder, environment, restarts, disk
    cloud       pods, volumes and bills
    faults      faults that can be injected
    server      the HTTP server
    s3          moto, limited to the operations that RunPod has, in sync with the volume's folder
"""
