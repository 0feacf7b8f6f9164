// Drawing one token a row from edited logits: the same meaning as engine/sampler.py, whose tests it passes. A row is
// one thread's work from start to end, in a fixed order, so neighbours can't change its token.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "model.h"

namespace onebase {

struct Draw {  // mirrored in kernels/cpu_abi.py
    double uniform;
    float temperature, top_p, min_p;
    int32_t top_k, greedy;
};

// First token of the largest logit; 0 if every logit is NaN.
inline int argmax(const float* logits, int n) {
    constexpr int CHUNK = 512;
    float top = -std::numeric_limits<float>::infinity();
    int best = 0;
    for (int first = 0; first < n; first += CHUNK) {
        const int end = std::min(n, first + CHUNK);
        v16f most = splat(-std::numeric_limits<float>::infinity());
        int i = first;
        for (; i + LANES <= end; i += LANES) {
            const v16f x = load(logits + i);
            most = select(x > most, x, most);
        }
        float here = max_of(most);
        for (; i < end; i++) here = logits[i] > here ? logits[i] : here;
        if (here > top) top = here, best = first;
    }
    for (int i = best; i < n; i++)
        if (logits[i] == top) return i;
    return 0;
}

struct Candidate {
    float weight;
    int32_t token;
    bool operator<(const Candidate& other) const {
        return weight != other.weight ? weight > other.weight : token < other.token;
    }
};

class RowSampler {
    static constexpr int CHUNK = 512;
    std::vector<float> weights_;
    std::vector<double> sums_;  // of each chunk
    std::vector<Candidate> kept_;
    double total_ = 0;

    // weights_ = exp((logit - max) / temperature): 1 at the likeliest, 0 where banned.
    void weigh(const float* logits, int n, float temperature) {
        const float top = logits[argmax(logits, n)], inverse = 1.0f / temperature;
        weights_.assign((n + CHUNK - 1) / CHUNK * CHUNK, 0.0f);
        sums_.clear();
        total_ = 0;
        for (int first = 0; first < n; first += CHUNK) {
            const int end = std::min(n, first + CHUNK);
            int i = first;
            for (; i + LANES <= end; i += LANES) store(&weights_[i], vexp((load(logits + i) - splat(top)) * splat(inverse)));
            for (; i < end; i++) weights_[i] = vexp(splat((logits[i] - top) * inverse))[0];
            double sum = 0;
            for (i = first; i < first + CHUNK; i += LANES) sum += onebase::sum(load(&weights_[i]));
            sums_.push_back(sum);
            total_ += sum;
        }
    }

    int draw_plain(double uniform, int n) const {
        double left = uniform * total_;
        int chunk = 0;
        while (chunk + 1 < int(sums_.size()) && left >= sums_[chunk]) left -= sums_[chunk++];
        int last = 0;
        for (int i = chunk * CHUNK; i < std::min(n, (chunk + 1) * CHUNK); i++) {
            if (weights_[i] > 0) last = i;
            left -= weights_[i];
            if (left < 0) return i;
        }
        return last;
    }

    // Tokens of weight >= `least`, by id.
    void collect(float least, int n) {
        kept_.clear();
        for (int first = 0; first < n; first += LANES) {
            const v16i in = load(&weights_[first]) >= splat(least);
            bool any = false;
            for (int i = 0; i < LANES; i++) any |= in[i] != 0;
            if (!any) continue;
            for (int i = first; i < std::min(n, first + LANES); i++)
                if (weights_[i] >= least && weights_[i] > 0) kept_.push_back({weights_[i], i});
        }
    }

    double mass(size_t begin, size_t end) const {
        double sum = 0;
        for (size_t i = begin; i < end; i++) sum += kept_[i].weight;
        return sum;
    }

    // Keeps the heaviest tokens up to the one with which they reach `target`: a quickselect by mass.
    void keep_mass(double target) {
        size_t low = 0, high = kept_.size();
        double before = 0;
        while (high - low > 32) {
            Candidate a = kept_[low], b = kept_[low + (high - low) / 2], c = kept_[high - 1];
            const Candidate pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
            const auto middle = std::partition(kept_.begin() + low, kept_.begin() + high, [&](const Candidate& x) { return x < pivot; });
            const size_t border = middle - kept_.begin();
            const double left = mass(low, border);
            if (before + left >= target) high = border;
            else if (border > low) before += left, low = border;
            else break;
        }
        std::sort(kept_.begin() + low, kept_.begin() + high);
        size_t count = low;
        while (count < kept_.size() && (count == 0 || before < target)) before += kept_[count++].weight;
        kept_.resize(count);
    }

    // min_p, then top_k, then top_p of the mass that those left.
    int draw_truncated(const Draw& draw, int n) {
        const int most = draw.top_k > 0 ? std::min(draw.top_k, n) : n;
        const bool whole = most == n && draw.min_p <= 0;  // top_p is of everything
        for (float least = 1e-2f;; least *= 1e-2f) {
            const bool everything = least < 1e-30f;
            collect(std::max(draw.min_p, everything ? 0.0f : least), n);
            if (everything || draw.min_p >= least) break;
            if (whole ? mass(0, kept_.size()) >= double(draw.top_p) * total_ : int(kept_.size()) >= most) break;
        }
        if (int(kept_.size()) > most) {
            std::nth_element(kept_.begin(), kept_.begin() + most, kept_.end());
            kept_.resize(most);
        }
        if (draw.top_p < 1) keep_mass(double(draw.top_p) * (whole ? total_ : mass(0, kept_.size())));
        double left = draw.uniform * mass(0, kept_.size());
        for (const Candidate& c : kept_) {
            left -= c.weight;
            if (left < 0) return c.token;
        }
        return kept_.empty() ? 0 : kept_.back().token;
    }

  public:
    int draw(const float* logits, int n, const Draw& draw) {
        if (draw.greedy) return argmax(logits, n);
        weigh(logits, n, draw.temperature);
        const bool truncated = draw.top_p < 1 || draw.top_k > 0 || draw.min_p > 0;
        return truncated ? draw_truncated(draw, n) : draw_plain(draw.uniform, n);
    }
};

}  // namespace onebase
