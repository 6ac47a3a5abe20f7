"""Rented pods: RunPod's API, a Prefect worker for it, what runs inside a pod, and an emulator of all of it.

models, errors, client   RunPod's REST API, version 2
account                  where the API, the volume and the keys are
image                    whether an image can be pulled, asked before a pod is rented
rent                     from a preference list to one pod, within the budget
watch                    what a pod's looks mean: started, dead, silent, idle, past its deadline
worker                   Prefect's work-pool type `runpod`
pod, program             the program of a pod (standard library only), and how it travels
home, remote             the pod that keeps the Prefect server: its program, and who starts and ends it
smoke                    what RunPod's documents leave open, found out on two small pods
reaper                   ends what nobody owns
emulator/                a local RunPod that runs pods as processes
"""
