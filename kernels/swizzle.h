// Where pieces of rows are in shared memory.
#pragma once

#include "geometry.h"

// Rows of a tile in shared memory, 32, 64 or 128 bytes each, are swizzled as the TMA unit does it: by the row's place in 128-byte lines,
// so that eight neighbouring rows' equal pieces lie in different banks. The offset of a 16-byte piece:
HOST_DEVICE uint32_t swizzled(int row, int piece, int row_bytes) {
    const int turn = row_bytes == 128 ? row & 7 : row_bytes == 64 ? row >> 1 & 3 : row >> 2 & 1;
    return row * row_bytes + ((piece ^ turn) << 4);
}
