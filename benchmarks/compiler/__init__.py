"""What compilers make of the kernels, for GPUs and TPUs that need not be here: `maskgit profile`."""
