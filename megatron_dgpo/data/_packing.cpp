// The assignment of sequences to micro-batches and of groups to replicas; packing.py and shares.py have the twins
// in Python and the words.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <optional>
#include <queue>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using Bins = std::vector<std::vector<std::int64_t>>;
using Lengths = std::vector<std::int64_t>;
constexpr std::int64_t kToleranceInverse = 50;  // shares.py has it too

void check(const Lengths& lengths, std::int64_t max_tokens, std::int64_t min_bins) {
    if (min_bins < 1) {
        throw std::invalid_argument("min_bins is " + std::to_string(min_bins) + ", expected at least 1");
    }
    for (std::size_t index = 0; index < lengths.size(); ++index) {
        if (lengths[index] < 1 || lengths[index] > max_tokens) {
            throw std::invalid_argument("lengths[" + std::to_string(index) + "] is " +
                                        std::to_string(lengths[index]) + ", expected 1 to max_tokens=" +
                                        std::to_string(max_tokens));
        }
    }
}

Bins first_fit(const Lengths& lengths, const std::vector<std::int64_t>& order, std::int64_t max_tokens) {
    Bins bins;
    std::vector<std::int64_t> loads;
    for (std::int64_t index : order) {
        const std::int64_t length = lengths[index];
        auto place = std::find_if(loads.begin(), loads.end(),
                                  [&](std::int64_t load) { return load + length <= max_tokens; });
        if (place == loads.end()) {
            loads.push_back(length);
            bins.push_back({index});
        } else {
            *place += length;
            bins[place - loads.begin()].push_back(index);
        }
    }
    return bins;
}

std::optional<Bins> lightest_first(const Lengths& lengths, const std::vector<std::int64_t>& order,
                                   std::int64_t max_tokens, std::int64_t count) {
    using Entry = std::pair<std::int64_t, std::int64_t>;  // (load, bin)
    std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> heap;
    for (std::int64_t place = 0; place < count; ++place) heap.emplace(0, place);
    Bins bins(count);
    for (std::int64_t index : order) {
        const auto [load, place] = heap.top();
        if (load + lengths[index] > max_tokens) return std::nullopt;  // then it fits into no bin at all
        heap.pop();
        heap.emplace(load + lengths[index], place);
        bins[place].push_back(index);
    }
    return bins;
}

void level(const Lengths& lengths, Bins& bins) {
    std::vector<std::int64_t> loads(bins.size(), 0);
    for (std::size_t place = 0; place < bins.size(); ++place) {
        for (std::int64_t index : bins[place]) loads[place] += lengths[index];
    }
    while (true) {
        std::int64_t high = -1;
        std::size_t low = 0;
        for (std::size_t place = 0; place < bins.size(); ++place) {
            if (bins[place].size() > 1 && (high < 0 || loads[place] > loads[high])) {
                high = static_cast<std::int64_t>(place);
            }
            if (loads[place] < loads[low]) low = place;
        }
        if (high < 0) return;
        const std::int64_t gap = loads[high] - loads[low];
        std::int64_t best = -1;
        for (std::int64_t index : bins[high]) {
            if (lengths[index] >= gap) continue;
            if (best < 0 || lengths[index] > lengths[best] ||
                (lengths[index] == lengths[best] && index < best)) {
                best = index;
            }
        }
        if (best < 0) return;
        bins[high].erase(std::find(bins[high].begin(), bins[high].end(), best));
        bins[low].push_back(best);
        loads[high] -= lengths[best];
        loads[low] += lengths[best];
    }
}

Bins balanced_bins(const Lengths& lengths, std::int64_t max_tokens, std::int64_t min_bins) {
    check(lengths, max_tokens, min_bins);
    std::vector<std::int64_t> order(lengths.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](std::int64_t a, std::int64_t b) { return lengths[a] > lengths[b]; });
    Bins fitted = first_fit(lengths, order, max_tokens);
    const std::int64_t count = std::min(std::max(static_cast<std::int64_t>(fitted.size()), min_bins),
                                        static_cast<std::int64_t>(lengths.size()));
    std::optional<Bins> bins = lightest_first(lengths, order, max_tokens, count);
    if (!bins) {
        fitted.resize(count);
        level(lengths, fitted);
        bins = std::move(fitted);
    }
    for (auto& bin : *bins) std::sort(bin.begin(), bin.end());
    std::sort(bins->begin(), bins->end());
    return *bins;
}

// The swap that brings a heavy and a light replica closest: indices, or nothing where none helps.
std::optional<std::pair<std::size_t, std::size_t>> best_swap(const Lengths& lengths, const Lengths& targets,
                                                             std::int64_t heavy, std::int64_t light,
                                                             std::int64_t gap) {
    std::optional<std::pair<std::size_t, std::size_t>> best;
    std::int64_t best_left = gap;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
        if (targets[i] != heavy) continue;
        for (std::size_t j = 0; j < lengths.size(); ++j) {
            if (targets[j] != light) continue;
            const std::int64_t left = std::abs(gap - 2 * (lengths[i] - lengths[j]));
            if (left < best_left) {
                best_left = left;
                best = {i, j};
            }
        }
    }
    return best;
}

Lengths balanced_shares(const Lengths& owners, const Lengths& lengths, std::int64_t replicas) {
    const auto count = static_cast<std::int64_t>(owners.size());
    if (replicas < 1 || count % replicas || owners.size() != lengths.size()) {
        throw std::invalid_argument(std::to_string(count) + " groups with " + std::to_string(lengths.size()) +
                                    " lengths cannot be shared equally by " + std::to_string(replicas) +
                                    " replicas");
    }
    Lengths room(replicas, count / replicas), targets, loads(replicas, 0);
    for (std::int64_t owner : owners) {
        if (owner < 0 || owner >= replicas) {
            throw std::invalid_argument("owner " + std::to_string(owner) + " is none of " +
                                        std::to_string(replicas) + " replicas");
        }
        targets.push_back(room[owner] > 0 ? owner : -1);
        if (room[owner] > 0) --room[owner];
    }
    std::int64_t free = 0, total = 0;
    for (std::size_t i = 0; i < targets.size(); ++i) {
        if (targets[i] < 0) {
            while (room[free] == 0) ++free;
            targets[i] = free;
            --room[free];
        }
        loads[targets[i]] += lengths[i];
        total += lengths[i];
    }
    while (true) {
        const auto heavy = std::max_element(loads.begin(), loads.end()) - loads.begin();
        const auto light = std::min_element(loads.begin(), loads.end()) - loads.begin();
        const std::int64_t gap = loads[heavy] - loads[light];
        if (gap * replicas * kToleranceInverse <= total) return targets;
        const auto swap = best_swap(lengths, targets, heavy, light, gap);
        if (!swap) return targets;
        const std::int64_t moved = lengths[swap->first] - lengths[swap->second];
        loads[heavy] -= moved;
        loads[light] += moved;
        std::swap(targets[swap->first], targets[swap->second]);
    }
}

}  // namespace

PYBIND11_MODULE(_packing, module) {
    module.doc() = "Assigns sequences to token-budgeted micro-batches, and groups to replicas, of similar size.";
    module.def("balanced_bins", &balanced_bins, pybind11::arg("lengths"), pybind11::arg("max_tokens"),
               pybind11::arg("min_bins") = 1, pybind11::call_guard<pybind11::gil_scoped_release>());
    module.def("balanced_shares", &balanced_shares, pybind11::arg("owners"), pybind11::arg("lengths"),
               pybind11::arg("replicas"), pybind11::call_guard<pybind11::gil_scoped_release>());
}
