"""Rented pods: RunPod's API, a Prefect worker for it, the program inside a pod, and an emulator of all of it.

models, errors, client   RunPod's REST API, version 2
account                  an account with one of its volumes, and the keys to both
image                    checks that an image can be pulled before a pod is rented
rent                     rents one pod from a list of preferences, within the budget
watch                    the health of a pod: started, dead, silent, idle, past its deadline
worker                   Prefect's work-pool type `runpod`
pod, program             the program of a pod (standard library only), and how it gets there
server_pod, remote       the pod that runs the Prefect server: its program, and how it is started and ended
smoke                    answers what RunPod's documentation leaves open, on two small pods
reaper                   ends orphaned pods
emulator/                a local RunPod that runs pods as processes
"""
