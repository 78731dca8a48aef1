// Where elements of operands are, in shared memory and as fragments.
#pragma once

#include "geometry.h"

// Rows of a tile in shared memory, 32, 64 or 128 bytes each, are swizzled as the TMA unit does it: by the row's place in 128-byte lines,
// so that eight neighbouring rows' equal pieces lie in different banks. The offset of a 16-byte piece:
HOST_DEVICE uint32_t swizzled(int row, int piece, int row_bytes) {
    const int turn = row_bytes == 128 ? row & 7 : row_bytes == 64 ? row >> 1 & 3 : row >> 2 & 1;
    return row * row_bytes + ((piece ^ turn) << 4);
}

// 64 rows of 16 columns of operand A as the lanes of four mma.m16n8k16 hold them: 16 bytes of each lane, 32 lanes, 16 rows after 16 rows (PTX ISA, "mma.m16n8k16"). Where an element is,
// in elements, is the sum of both; neighbouring columns, the first one even, are neighbours.
HOST_DEVICE int fragment_place_of_row(int row) { return row / 16 * 256 + row % 8 * 32 + row % 16 / 8 * 2; }
HOST_DEVICE int fragment_place_of_column(int column) { return column % 8 / 2 * 8 + column / 8 * 4 + column % 2; }
