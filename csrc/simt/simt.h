// simt.h - what a kernel's source sees in place of the CUDA toolkit's headers.
//
// A block's threads are fibers on one host thread: a thread runs until it waits (barrier, shuffle, end), then the next
// one does. See options.h for the orders it can take and tests/simt for the faults it finds.
#pragma once
#include "simt/async_copy.h"
#include "simt/intrinsics.h"
#include "simt/launch.h"
#include "simt/matrix.h"
#include "simt/options.h"
#include "simt/shared.h"
#include "simt/sync.h"
#include "simt/types.h"
