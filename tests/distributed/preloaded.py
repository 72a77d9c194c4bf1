"""What every rank of every group imports: once, in the process that they are forked from."""

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # brings torch's compiler, at the first engine above stage 0
import packaging.markers
import peft
import setuptools
import torch
import transformers.models.llama.modeling_llama

import launcher.checkpoint.saver
import launcher.train.run
import tests.distributed.tiny

__all__ = ["deepspeed", "launcher", "packaging", "peft", "setuptools", "tests", "torch", "transformers"]
