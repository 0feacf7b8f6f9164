// The AMX instructions as inline assembly. The compiler's own macros don't tell it that tile loads read memory, so it
// may drop or move the stores that fill a tile; these do.
#pragma once

#include "common.h"

#ifdef ONEBASE_AMX
namespace onebase {

struct __attribute__((packed)) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};
inline void tile_configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
inline void tile_release() { __asm__ volatile("tilerelease" ::: "memory"); }

#define TILE_ZERO(T) __asm__ volatile("tilezero %%tmm" #T ::)
#define TILE_LOAD(T, ADDRESS, STRIDE) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #T ::"r"((const void*)(ADDRESS)), "r"((long)(STRIDE)) : "memory")
#define TILE_STORE(T, ADDRESS, STRIDE) \
    __asm__ volatile("tilestored %%tmm" #T ", (%0,%1,1)" ::"r"((void*)(ADDRESS)), "r"((long)(STRIDE)) : "memory")
#define TILE_DOT(C, A, B) __asm__ volatile("tdpbf16ps %%tmm" #B ", %%tmm" #A ", %%tmm" #C ::)

}  // namespace onebase
#endif
